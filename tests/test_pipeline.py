"""The whole pipeline through DVC, on a shortened demo: what it leaves, and what it runs again."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

from tests.conftest import NAME, PHOTOS, PROJECT, change, dvc

NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_source_notebook_is_clean_and_has_parameters(path):
    cells = nbformat.read(path, as_version=4).cells
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)


@pytest.mark.parametrize(("name", "layers"), [(NAME, 55), (PHOTOS, 52)])
def test_it_leaves_what_a_comparison_needs(done, name, layers):
    results = done / "results" / "demo" / name
    table = pd.read_csv(results / "tradeoff.csv")
    expected = {"method", "target", "flops", "flops_ratio", "params", "accuracy_before", "accuracy", "epochs"}
    assert expected | {"latency_ms", "seed"} <= set(table.columns)
    assert set(table.method) == {"legr", "norm", "uniform", "legr-tau0"}
    assert (table.flops_ratio < table.target).all()
    search = pd.read_csv(results / "search.csv")
    assert list(search.columns) == ["evaluation", "loss", "accuracy", "best"] + ["images"] * (name == NAME)  # it races
    assert len(json.loads((results / "ranking.json").read_text())["scale"]) == layers
    for figure in (
        "training",
        "search",
        "search-tau0",
        "ranking",
        "widths",
        "prediction",
        "tradeoff",
        "latency",
        "latency-parts",
    ):
        assert (results / "figures" / f"{figure}.png").stat().st_size > 5000
        assert (results / "figures" / f"{figure}.svg").stat().st_size > 5000
        assert len(pd.read_csv(results / "figures" / f"{figure}.csv")) > 1
    assert not (done / ".state").exists() or not list((done / ".state").rglob("*.*"))


def test_executed_notebooks_are_clean(done):
    paths = list((done / "results").rglob("*.ipynb"))
    assert len(paths) == 20
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
        told = [v for o in outputs for k, v in o.get("data", {}).items() if k.startswith("text/")]
        text = "\n".join([cell.source for cell in notebook.cells] + told)
        text = re.sub(r"base64,[\w+/=]+", "", text)
        for dirt in (str(done), str(PROJECT), str(Path.home()) + "/", "it/s", "Warning", "papermill"):
            assert dirt not in text, (path.name, dirt)
        assert outputs
        assert not [o for o in outputs if o.output_type in ("error", "stream")], path.name


def test_a_second_run_has_nothing_to_do(done):
    assert "up to date" in dvc(done, "repro")
    assert "up to date" in dvc(done, "status")


def test_metrics_and_plots_show_the_headline(done):
    metrics = json.loads(dvc(done, "metrics", "show", "--json"))[""]["data"]
    assert metrics[f"results/demo/{NAME}/metrics.json"]["data"]["0.5"]["legr"] > 0
    page = dvc(done, "plots", "show", "--out", "plots").strip()
    assert page.startswith("file:")
    assert "tradeoff" in (done / "plots" / "index.html").read_text()


def planned(folder, edit):
    """The stages that `dvc repro` would run after an edit of params.yaml, which is then undone."""
    before = (folder / "params.yaml").read_text()
    try:
        change(folder, edit)
        lines = dvc(folder, "repro", "--dry").splitlines()
    finally:
        (folder / "params.yaml").write_text(before)
    return {line.split("'")[1].split("@")[0] for line in lines if line.startswith("Running stage")}, [
        line.split("'")[1] for line in lines if line.startswith("Running stage")
    ]


def test_fine_tuning_does_not_search_again(done):
    names, _ = planned(done, lambda p: p["demo"][NAME]["finetune"]["recipe"].update(epochs=3))
    assert names == {"prune", "prune-plain", "prune-tau0", "compare"}


def test_a_new_target_makes_only_the_new_networks(done):
    names, stages = planned(done, lambda p: p["experiments"][NAME]["targets"].append(0.4))
    assert names == {"prune", "prune-plain", "compare"}
    assert sum("0.4" in stage for stage in stages) == 3
    assert not any("0.5" in stage for stage in stages)


def test_another_search_leaves_the_baseline_alone(done):
    names, _ = planned(done, lambda p: p["demo"][NAME]["search"].update(flops=0.4))
    assert names == {"ranking", "ranking-tau0", "fitness"}  # and what follows, if they come out otherwise


def test_a_new_ranking_makes_only_its_own_networks(done):
    ranking = done / "results" / "demo" / NAME / "ranking.json"
    before = ranking.read_text()
    try:
        ranking.write_text(before.replace("]", "]\n", 1))
        lines = dvc(
            done, "repro", "--dry", "--downstream", f"prune@demo-{NAME}-legr-0.5", f"prune-plain@demo-{NAME}-norm-0.5"
        )
    finally:
        ranking.write_text(before)
    assert f"Running stage 'prune@demo-{NAME}-legr-0.5'" in lines
    assert f"Running stage 'prune-plain@demo-{NAME}-norm-0.5'" not in lines


def test_a_failed_stage_keeps_what_was_there(done):
    weights = done / "results" / "demo" / NAME / "baseline.safetensors"
    before, params = weights.read_bytes(), (done / "params.yaml").read_text()
    try:
        change(done, lambda p: p["demo"][NAME]["baseline"]["recipe"].update(lr=-1))
        told = dvc(done, "repro", f"baseline@demo-{NAME}", check=False)
        assert "baseline.recipe.lr is -1" in told
        assert weights.read_bytes() == before
    finally:
        (done / "params.yaml").write_text(params)
        dvc(done, "repro")


def test_a_notebook_runs_by_hand_from_its_folder(done):
    """As in JupyterLab: current folder notebooks/, the parameters cell edited to play in another folder."""
    shutil.copytree(done / "results", done / "playground")
    notebook = nbformat.read(done / "notebooks" / "2_ranking.ipynb", as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += '\nresults, overrides = "playground", {"search.algorithm.evaluations": 5}\n'
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(done / "notebooks")}}).execute()
    assert len(pd.read_csv(done / "playground" / "demo" / NAME / "search.csv")) == 5
    assert len(pd.read_csv(done / "results" / "demo" / NAME / "search.csv")) == 6
