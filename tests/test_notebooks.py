"""The notebook that is no stage's: your_model.ipynb, on tiny parameters."""

import itertools
import json

import nbformat
import pandas as pd
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient

from tests.conftest import PROJECT


def run(path, parameters):
    """Execute a notebook with other parameters, in its folder."""
    content = nbformat.read(path, as_version=4)
    (cell,) = [cell for cell in content.cells if "parameters" in cell.metadata.get("tags", [])]
    assert all(f"{name}" in cell.source for name in parameters)
    cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    NotebookClient(content, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    return content


@pytest.mark.slow
def test_your_model_leaves_a_set_of_networks(tmp_path):
    fast = {"epochs": 1, "finetune_epochs": 1, "evaluations": 4, "targets": [0.6, 0.3], "folder": str(tmp_path)}
    fast |= {"normalization": "none", "resolution": [32, 24]}
    executed = run(PROJECT / "notebooks/your_model.ipynb", fast)
    names = {f"resnet18-{size}.{s}" for size in ("dense", "60%", "30%") for s in ("safetensors", "json", "onnx")}
    assert names <= {path.name for path in tmp_path.iterdir()}
    notes = [json.loads((tmp_path / f"resnet18-{size}.json").read_text()) for size in ("dense", "60%", "30%")]
    for large, small in itertools.pairwise(notes):
        assert all(small["widths"][layer] <= width for layer, width in large["widths"].items())
    assert (notes[2]["inputs"], notes[2]["normalization"]) == ([3, 32, 24], {"mean": [0], "std": [1]})
    page = executed.cells[-1].outputs[-1].data["text/html"]
    cells = [[c.get_text() for c in row.find_all(["th", "td"])] for row in BeautifulSoup(page, "html.parser")("tr")]
    table = pd.DataFrame([row[1:] for row in cells[2:]], columns=cells[0][1:]).astype(float)
    assert len(table) == 3 and (table["difference, read back"] < 1e-4).all()
    assert (table["difference, ONNX"] < 1e-3).all()
    assert (table.MFLOPs[1:] / table.MFLOPs[0] < [0.6, 0.3]).all()

    again = run(
        PROJECT / "notebooks/your_model.ipynb", fast | {"checkpoint": str(tmp_path / "resnet18-dense.safetensors")}
    )
    assert page.split("<td>")[2] == again.cells[-1].outputs[-1].data["text/html"].split("<td>")[2]  # the accuracy
