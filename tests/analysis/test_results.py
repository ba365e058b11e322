"""Committed results are whole, the pages say what they say, and what pages link to exists."""

import json
import re
import subprocess

import nbformat
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import PROJECT


def committed(pattern):
    listed = subprocess.run(["git", "ls-files", "results"], cwd=PROJECT, capture_output=True, text=True)
    paths = [PROJECT / path for path in listed.stdout.split()] or list((PROJECT / "results").rglob("*"))
    found = [path for path in paths if path.match(pattern) and path.is_file() and "demo" not in path.parts]
    assert found, pattern
    return found


def test_files_of_results_are_whole_and_small():
    for path in committed("*.*"):
        assert path.stat().st_size <= 5 * 2**20, path
        if path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".csv":
            assert len(pd.read_csv(path)) > 0, path
        elif path.suffix == ".safetensors":
            assert all(tensor.isfinite().all() for tensor in load_file(path).values()), path
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.verify()
        elif path.suffix == ".ipynb":
            outputs = [o for cell in nbformat.read(path, as_version=4).cells for o in cell.get("outputs", [])]
            assert not [o for o in outputs if o.output_type == "error"], path


@pytest.mark.parametrize(("page", "part"), [("README.md", "answer.md"), ("docs/results.md", "results.md")])
def test_the_pages_say_what_the_report_found(page, part):
    """The report stage has written what stands there, from the stages' tables."""
    found = (PROJECT / "results/laptop/report" / part).read_text(encoding="utf-8")
    assert len(found) > 200 and found in (PROJECT / page).read_text(encoding="utf-8")


def test_what_the_pages_link_to_exists():
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")), PROJECT / "data" / "README.md"]
    missing = []
    for page in pages:
        text = re.sub("(`+)[^`]*\\1", "", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith("http") and not (page.parent / target).exists():
                missing.append((page.name, target))
    assert not missing
