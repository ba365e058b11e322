"""Committed results are whole, the pages say what they say, and what pages link to exists."""

import json
import re
import subprocess

import nbformat
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file

from experiments.methods import METHODS
from tests.conftest import NAME, PHOTOS, PROJECT

LAPTOP = PROJECT / "results" / "laptop"
EXPERIMENTS = [(NAME, "CIFAR-10"), (PHOTOS, "Imagenette")]


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


def rows(page, title):
    """Cells of the table's lines in the part of a page that begins with `title`, bold or a heading."""
    parts = re.split(r"^(?=\*\*|#+ )", (PROJECT / page).read_text(encoding="utf-8"), flags=re.M)
    (text,) = [part for part in parts if re.match(rf"(\*\*|#+ ){title}", part)]
    table = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in table if not set("".join(row)) <= {"-", ":"}], text


@pytest.mark.parametrize(("name", "title"), EXPERIMENTS)
def test_the_readme_says_what_was_measured(name, title):
    """Mean accuracies over trials, in the row of their method and the column of their FLOPs."""
    (head, *body), text = rows("README.md", title)
    said = {(row[0], target): cell for row in body for target, cell in zip(head[1:], row[1:], strict=True)}
    labels = {row[0] for row in body}
    means = pd.read_csv(LAPTOP / name / "compare/tradeoff.csv").groupby(["method", "target"]).accuracy.mean()
    assert {"norm-only", "uniform"} < labels
    for (method, target), accuracy in means.items():
        if METHODS[method].label in labels:
            assert said.pop((METHODS[method].label, f"{target:.0%}")) == f"{100 * accuracy:.2f}", (method, target)
        else:  # left out here, with its reason; told there
            assert f"{100 * accuracy:.2f}" in (PROJECT / "docs/results.md").read_text(encoding="utf-8")
    assert not [key for key, cell in said.items() if "paper" not in key[0].split(",")[-1] and re.search(r"\d", cell)]
    dense = json.loads((LAPTOP / name / "dense/dense.json").read_text())["accuracy"]
    assert f"dense: {100 * dense:.2f}" in text


def test_what_the_pages_link_to_exists():
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")), PROJECT / "data" / "README.md"]
    missing = []
    for page in pages:
        text = re.sub("(`+)[^`]*\\1", "", page.read_text(encoding="utf-8"))
        for target in re.findall(r"\]\(([^)#\s]+)", text):
            if not target.startswith("http") and not (page.parent / target).exists():
                missing.append((page.name, target))
    assert not missing
