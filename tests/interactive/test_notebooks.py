"""The notebook that is no stage's: your_model.ipynb, on tiny parameters, and with mistakes in them."""

import itertools
import json
import re

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient

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
    """Execute it in its folder; the tables and the text that it shows, and the captions of its pictures."""
    content, cells = code(parameters)
    NotebookClient(content, timeout=600, resources={"metadata": {"path": str(PATH.parent)}}).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    text = "".join(output.text for output in outputs if output.get("name") == "stdout")
    pictures = [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]
    return [as_table(page) for page in pages], text, pictures


def as_table(page):
    rows = [[c.get_text() for c in row.find_all(["th", "td"])] for row in BeautifulSoup(page, "html.parser")("tr")]
    columns, body = rows[0][1:], [row for row in rows[1:] if any(row[1:])]  # without the row that names the index
    return pd.DataFrame([row[1:] for row in body], [row[0] for row in body], columns)


@pytest.mark.slow
def test_your_model_advises_for_each_size_and_leaves_networks_that_load_elsewhere(tmp_path):
    fast = {"architecture": "mobilenet_v2", "epochs": 1, "finetune_epochs": 1, "evaluations": 10, "targets": [0.4, 0.6]}
    fast |= {"folder": str(tmp_path), "normalization": "none", "resolution": [32, 24], "judged_at": [0.8, 0.6]}
    (table, times), said, captions = run(fast)
    methods = {"norm": "norm-only", "norm-kept": "norm-only + rule", "legr-ours": "LeGR, ours"}
    if "norm-only + rule is left out" in said:  # where it keeps the same filters as norm-only
        del methods["norm-kept"]
    names = [f"{method}-{target}" for target in (0.6, 0.4) for method in methods]
    assert table.method.to_dict() == {"dense": "dense"} | dict(zip(names, [*methods.values()] * 2, strict=True))
    flops = table.MFLOPs.astype(float)
    for target in (0.6, 0.4):
        assert (flops.filter(like=f"-{target}") / flops["dense"]).between(target - 0.1, target + 0.01).all()

    exact, advised = 100 * pd.read_csv(tmp_path / "networks.csv", index_col="network").accuracy, []
    for target, advice in zip((0.6, 0.4), said.strip().splitlines()[-2:], strict=True):
        taken = next(m for m, label in methods.items() if advice.startswith(f"{target:.0%}: take {label}, "))
        advised.append(f"{taken}-{target}")
        assert f", {exact[advised[-1]]:.1f}%: " in advice
        for method in set(methods) - {taken}:
            more = exact[advised[-1]] - exact[f"{method}-{target}"]
            lead = re.escape(f"{more:+.1f}".replace("-", "−"))
            assert re.search(rf"{lead} ± [0-9.]+ over {re.escape(methods[method])}[;)]", advice)

    assert "998 training and 599 test images" in captions[-1]
    *parts, everything = times.seconds.astype(float)
    assert times.index[1] == "search" and min(parts) > 0 and sum(parts) < everything

    files = {f"{name}.{suffix}" for name in ("dense", *names) for suffix in ("safetensors", "json")}
    files |= {f"{name}.onnx" for name in ("dense", *advised)} | {"load.py", "check.safetensors"}
    assert files == {path.name for path in (tmp_path / "networks").iterdir()}
    notes = {name: json.loads((tmp_path / f"networks/{name}.json").read_text()) for name in ("dense", *names)}
    for large, small in itertools.pairwise(("dense", "legr-ours-0.6", "legr-ours-0.4")):
        assert all(notes[small]["widths"][layer] <= width for layer, width in notes[large]["widths"].items())
    about = notes["legr-ours-0.4"]
    assert (about["inputs"], about["normalization"]) == ([3, 32, 24], {"mean": [0], "std": [1]})

    less = {"checkpoint": str(tmp_path / "networks/dense.safetensors"), "targets": [0.5], "folder": str(tmp_path / "2")}
    (again, times), _, _ = run(fast | less)
    assert again.loc["dense", "after (%)"] == table.loc["dense", "after (%)"]
    assert times.index[0] == "search"


@pytest.mark.parametrize("here", ["notebooks", ".."])
def test_your_model_writes_to_the_projects_playground_from_wherever_it_runs(tmp_path, monkeypatch, here):
    """JupyterLab in notebooks/, and from outside."""
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
    "too many held out": ({"holdout": 600}, r"^holdout is 600; it must be at most 599"),
    "percent": ({"targets": [70]}, r"^target is 70; "),
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
