"""The notebook that is no stage's: your_model.ipynb, on tiny parameters, and with mistakes in them."""

import itertools
import json

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from PIL import Image

import legr
from experiments import settings
from tests.conftest import PROJECT

PATH = PROJECT / "notebooks/your_model.ipynb"


def code(parameters):
    """The notebook with other parameters, and its code cells."""
    content = nbformat.read(PATH, as_version=4)
    (cell,) = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
    assert all(f"\n{name} = " in f"\n{cell.source}" for name in parameters)
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    return content, [cell for cell in content.cells if cell.cell_type == "code"]


def run(parameters):
    """Execute it in its folder; the tables and the text that it shows."""
    content, cells = code(parameters)
    NotebookClient(content, timeout=600, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    return [as_table(page) for page in pages], text


def as_table(page):
    rows = [[c.get_text() for c in row.find_all(["th", "td"])] for row in BeautifulSoup(page, "html.parser")("tr")]
    columns, body = rows[0][1:], [row for row in rows[1:] if any(row[1:])]  # without the row that names the index
    return pd.DataFrame([row[1:] for row in body], [row[0] for row in body], columns)


@pytest.mark.slow
def test_your_model_compares_three_methods_and_leaves_networks_that_load_elsewhere(tmp_path):
    fast = {"epochs": 1, "finetune_epochs": 1, "evaluations": 4, "targets": [0.3, 0.6], "folder": str(tmp_path)}
    fast |= {"normalization": "none", "resolution": [32, 24]}
    (table, times), said = run(fast)
    methods = {"legr": "LeGR (our fitness)", "norm": "norm-only", "uniform": "uniform"}
    expected = {"dense": "dense"} | {f"{m}-{t}": methods[m] for t in (0.6, 0.3) for m in methods}
    assert table.method.to_dict() == expected
    flops = table.MFLOPs.astype(float)
    assert (flops[1:4] / flops["dense"]).between(0.5, 0.6).all() and (flops[4:] / flops["dense"] < 0.3).all()
    after = table["after (%)"].astype(float)
    bounds = table["95% interval"].str.split(" to ", expand=True).astype(float)
    assert (bounds[0] <= after).all() and (after <= bounds[1]).all()
    assert table.loc["dense", "before (%)"] == "–" and table["before (%)"][1:].astype(float).between(0, 100).all()
    exact = 100 * pd.read_csv(tmp_path / "networks.csv", index_col="network").accuracy
    for t in (0.6, 0.3):
        for plain, label in (("norm", "norm-only"), ("uniform", "uniform")):
            more = exact[f"legr-{t}"] - exact[f"{plain}-{t}"]
            assert f"{100 * t:g}% FLOPs: LeGR − {label} {more:+.1f} ± " in said
    assert "One trial, 599 test images." in said

    svg = (tmp_path / "accuracy.svg").read_text()
    assert all(f"<!-- {word} -->" in svg for word in ("dense", *methods.values()))
    assert "998 training and 599 test images" in svg.replace("\n", " ")
    assert set(pd.read_csv(tmp_path / "accuracy.csv").method) == {"legr-ours", "norm", "uniform"}
    with Image.open(tmp_path / "accuracy.png") as image:
        assert image.width > 1000
    assert list(times.index[:2]) == ["training, dense", "search"] and len(times) == 6
    *parts, everything = times.seconds.astype(float)
    assert min(parts) > 0 and sum(parts) < everything

    networks = ["dense", "legr-0.6", "legr-0.3"]
    files = {f"{name}.{suffix}" for name in networks for suffix in ("safetensors", "json", "onnx")}
    assert files | {"load.py", "check.safetensors"} == {path.name for path in (tmp_path / "networks").iterdir()}
    notes = [json.loads((tmp_path / "networks" / f"{name}.json").read_text()) for name in networks]
    for large, small in itertools.pairwise(notes):
        assert all(small["widths"][layer] <= width for layer, width in large["widths"].items())
    assert (notes[2]["inputs"], notes[2]["normalization"]) == ([3, 32, 24], {"mean": [0], "std": [1]})
    assert len(legr.Ranking.load(tmp_path / "ranking.json").scale) == len(notes[0]["widths"])

    less = {"checkpoint": str(tmp_path / "networks/dense.safetensors"), "targets": [0.5], "folder": str(tmp_path / "2")}
    (again, times), _ = run(fast | less)
    assert again.loc["dense", "after (%)"] == table.loc["dense", "after (%)"]
    assert times.index[0] == "search"


@pytest.mark.parametrize("here", [".", "notebooks", "playground", ".."])
def test_your_model_writes_to_the_projects_playground_from_wherever_it_runs(tmp_path, monkeypatch, here):
    """papermill in the project's folder, JupyterLab in notebooks/, a copy to play with, and from outside."""
    project = tmp_path / "project"
    for name in ("notebooks", "playground"):
        (project / name).mkdir(parents=True)
    (project / "params.yaml").touch()
    monkeypatch.setattr(settings, "__file__", str(project / "experiments/settings.py"))
    monkeypatch.chdir(project / here)
    _, cells = code({"resolution": 16})
    scope = {}
    for cell in cells[:2]:
        exec(cell.source, scope)
    assert (project / "playground/your_model/images.pt").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"project"}


MISTAKES = {
    "too many held out": ({"holdout": 600}, r"^holdout is 600; it must be at most 599, half of the training images"),
    "percent": (
        {"targets": [70]},
        r"^targets and evaluations: targets\.0 is 70: input should be less than or equal to 1",
    ),
    "no such network": ({"architecture": "resnet19"}, "^architecture is 'resnet19', .*Unknown model resnet19"),
    "too small": ({"targets": [0.5, 0.001]}, r"^target is 0\.001; the lowest reachable fraction of this network is "),
}


@pytest.mark.parametrize(("parameters", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_the_parameters_is_one_sentence_before_anything_is_trained(
    tmp_path, monkeypatch, parameters, message
):
    monkeypatch.chdir(tmp_path)
    _, cells = code({"folder": "out", "resolution": 16} | parameters)
    scope = {}

    def trained(*_, **__):
        raise AssertionError

    with pytest.raises(legr.UserError, match=message) as error:
        for cell in cells[:3]:
            exec(cell.source, scope)
            scope["train"] = trained
    assert "\n" not in str(error.value)
