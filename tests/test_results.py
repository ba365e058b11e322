"""Committed results: they are what dvc.lock records, and the README says what they say."""

import hashlib
import json
import re
import subprocess

import pandas as pd
import pytest
import yaml

from experiments.config import workspace
from experiments.figures import LABELS
from tests.conftest import NAME, PROJECT

RESULTS = PROJECT / "results" / "laptop" / NAME


def recorded():
    """(file, MD5) of every output in dvc.lock that git keeps."""
    stages = yaml.safe_load((PROJECT / "dvc.lock").read_text())["stages"]
    outputs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    return {path: md5 for path, md5 in outputs.items() if path.startswith("results/") and "/demo/" not in path}


def test_committed_results_are_what_the_pipeline_recorded():
    outputs = recorded()
    assert len(outputs) > 60
    wrong = [p for p, md5 in outputs.items() if hashlib.md5((PROJECT / p).read_bytes()).hexdigest() != md5]
    assert not wrong


def test_every_committed_result_was_made_by_the_pipeline():
    listed = subprocess.run(["git", "ls-files", "results"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not in a git repository")
    made = {path for path in listed.stdout.split() if not path.startswith("results/benchmarks/")}  # by make bench
    assert made <= recorded().keys()


def test_all_networks_of_the_plan_are_there():
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        expected = set(workspace("laptop", NAME).networks)
    table = pd.read_csv(RESULTS / "tradeoff.csv")
    assert set(zip(table.method, table.target, strict=True)) == expected
    assert (table.flops_ratio < table.target).all()
    assert (table.epochs >= 5).all()


def test_the_readme_says_what_was_measured():
    text = (PROJECT / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    said = {(row[0], row[1]): row[2:6] for row in rows if len(row) >= 6}
    table = pd.read_csv(RESULTS / "tradeoff.csv")
    for row in table.itertuples():
        percents = [f"{100 * x:.2f}" for x in (row.accuracy_before, row.accuracy_recalibrated, row.accuracy)]
        assert said[LABELS[row.method], f"{row.target:.0%}"] == [f"{row.flops / 1e6:.1f}", *percents]
    assert f"{100 * json.loads((RESULTS / 'baseline.json').read_text())['accuracy']:.2f}" in text
    for row in pd.read_csv(RESULTS / "correlations.csv").itertuples():
        assert f"{row.spearman:.2f}".replace("-", "−") in text


def test_what_the_readme_links_to_exists():
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")), PROJECT / "data" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)
