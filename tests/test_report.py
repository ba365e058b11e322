"""The report: one page that needs no network, and what it says of the demo."""

import re

import nbformat
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from experiments import report
from tests.conftest import NAME, PHOTOS


def offline(page):
    assert "<script" not in page
    addresses = re.findall(r"https?://[^\s\"'<>)]+", page)
    assert not [a for a in addresses if not a.startswith("http://www.w3.org/")]


@pytest.mark.xdist_group("pipeline")
def test_the_report_is_whole_and_offline(done):
    page = (done / "results/demo/report.html").read_text()
    offline(page)
    soup = BeautifulSoup(page, "html.parser")
    assert "says nothing about LeGR" in " ".join(soup.select_one(".banner").text.split())
    assert len(soup("section")) == 2 * 6  # compare, dense, ranking, two sets, ablations
    assert [a["href"][1:] for a in soup.select("nav a")] == [section["id"] for section in soup("section")]
    assert soup.section.h2.text.startswith("5 ·")  # the answer first
    for needed in ("<math", "data:image/png", "data:image/gif"):
        assert needed in page
    assert "To play" not in page
    assert len(page) < 5e6


def test_a_page_of_another_scale_has_no_banner(tmp_path):
    cells = [new_markdown_cell("# 1 · Title\n\nText $x^2$ and `$5`.\n\n$$y$$\n\n> **To play:** change it.")]
    cells += [new_code_cell("1 < 2", outputs=[new_output("execute_result", {"text/plain": "True & <b>"})])]
    for name in (NAME, PHOTOS):
        (tmp_path / "laptop" / name / "dense").mkdir(parents=True)
        nbformat.write(new_notebook(cells=cells), tmp_path / "laptop" / name / "dense/notebook.ipynb")
    report.build(tmp_path / "laptop", [NAME, PHOTOS])
    page = (tmp_path / "laptop/report.html").read_text()
    offline(page)
    soup = BeautifulSoup(page, "html.parser")
    assert soup.select_one(".banner") is None and "$5" in page and "To play" not in page
    assert [formula["display"] for formula in soup("math")] == ["inline", "block"] * 2
    assert [section.h2.text for section in soup("section")] == ["1 · Title"] * 2
    assert "True & <b>" in soup.text and not soup.select("section b")
