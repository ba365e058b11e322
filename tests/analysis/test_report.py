"""The report: one page that needs no network, and what it says of the demo."""

import json
import re

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from experiments.analysis import report
from tests.conftest import NAME, PROJECT


@pytest.mark.xdist_group("pipeline")
def test_the_report_answers_first_and_is_whole_and_offline(done):
    folder = done / "results/demo/report"
    page = (folder / "index.html").read_text()
    soup = BeautifulSoup(page, "html.parser")
    links = {a["href"] for a in soup.select("a") if not a["href"].startswith("#")}
    for link in (link for link in links if not link.startswith("https://")):  # to click, not to load
        target = (folder / link).resolve().relative_to(done.resolve())
        assert (done / target).exists() or (PROJECT / target).exists(), link
    addresses = re.findall(r"https?://[^\s\"'<>)]+", page)
    assert not [a for a in addresses if not a.startswith("http://www.w3.org/") and a not in links]
    assert not [tag for tag in soup("script") if tag.get("src")] and not soup("link", rel="stylesheet")
    assert "says nothing about LeGR" in " ".join(soup.select_one(".banner").text.split())
    order = [
        tag.get("alt") or tag.get("id") or tag["class"][0] for tag in soup.select("img, #claims, #slider, section")
    ]
    assert [name[:8] for name in order[:4]] == ["Points o", "Where ea", "claims", "slider"]
    assert [a["href"][1:] for a in soup.select("nav details a")] == [section["id"] for section in soup("section")]
    assert all(soup.find(id=a["href"][1:]) for a in soup.select(".claims a, nav a"))
    assert soup.section.h2.text.startswith("5 ·")
    assert "<math" in page and "data:image/gif" in page and len(page) < 5e6


@pytest.mark.xdist_group("pipeline")
def test_the_slider_has_what_the_stages_found(done):
    soup = BeautifulSoup((done / "results/demo/report/index.html").read_text(), "html.parser")
    runs = json.loads(soup.find(id="cuts").string)
    assert list(runs) == [NAME]
    for name, run in runs.items():
        cuts = pd.read_csv(done / f"results/demo/{name}/sets/legr/cuts.csv")
        shown = run["methods"]["legr"]
        assert run["shares"] == cuts.share.tolist() and len(shown["widths"]) == len(cuts)
        assert shown["widths"][-1] == list(map(int, cuts.widths.iloc[-1].split()))
        assert shown["widths"][0] == run["dense"] and len(shown["tuned"]) == 1
    claimed = pd.read_csv(done / "results/demo/report/claims.csv")
    assert set(claimed.verdict) == {"untested"}  # digits
    answer = (done / "results/demo/report/answer.md").read_text()
    assert "digits, no verdict" in answer
    assert "fine-tuned 1 epoch, " in (done / "results/demo/report/results.md").read_text()


def test_a_chapter_is_its_notebook_with_formulas_and_without_hints(tmp_path):
    cells = [new_markdown_cell("# 1 · Title\n\nText $x^2$ and `$5`.\n\n$$y$$\n\n> **To play:** change it.")]
    cells += [new_code_cell("1 < 2", outputs=[new_output("execute_result", {"text/plain": "True & <b>"})])]
    (tmp_path / "sets/norm").mkdir(parents=True)
    nbformat.write(new_notebook(cells=cells), tmp_path / "sets/norm/notebook.ipynb")
    part = report._chapter(report._exporter(), tmp_path / "sets/norm/notebook.ipynb", tmp_path)
    assert part["title"] == "1 · Title: norm-only" and part["stage"] == "sets/norm"
    soup = BeautifulSoup(part["body"], "html.parser")
    assert "$5" in soup.text and "To play" not in soup.text and "True & <b>" in soup.text and not soup.select("b")
    assert [formula["display"] for formula in soup("math")] == ["inline", "block"]
