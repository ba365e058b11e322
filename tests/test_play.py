"""What a reader plays with: the explorer, a network of one's own, the movie, the one-page report."""

import nbformat
import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from PIL import Image

import legr
from experiments.config import workspace
from experiments.explorer import Controls, Instrument
from tests.conftest import NAME, PROJECT


def run(notebook, folder, parameters):
    """Execute a notebook as papermill would: with parameters, in its folder."""
    content = nbformat.read(folder / "notebooks" / f"{notebook}.ipynb", as_version=4)
    for cell in content.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\n" + "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    NotebookClient(content, timeout=300, resources={"metadata": {"path": str(folder / "notebooks")}}).execute()
    return content


def table(html):
    """The numbers of a rendered data frame; its first column is the index."""
    rows = [
        [cell.get_text() for cell in row.find_all(["th", "td"])] for row in BeautifulSoup(html, "html.parser")("tr")
    ]
    return pd.DataFrame(rows[1:], columns=rows[0]).iloc[:, 1:].astype(float)


@pytest.fixture(scope="module")
def instrument():
    """The committed result, without images: what a fresh clone has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        return Instrument(workspace("laptop", NAME))


def test_a_cut_counts_what_pruning_builds(instrument):
    for flops in (0.3, 0.62):
        cut = instrument.cut(flops)
        small = legr.prune(instrument.model, instrument.graph, cut.kept)
        assert cut.params == sum(p.numel() for p in small.parameters())
        assert cut.flops == legr.trace(small, torch.zeros(1, 3, 32, 32)).flops() < flops * instrument.dense_flops
        assert [small.get_submodule(layer.name).out_channels for layer in instrument.graph.layers] == cut.widths


def test_accuracy_is_read_off_measured_networks_only(instrument):
    measured = instrument.accuracy
    assert instrument.cut(0.47).accuracy == pytest.approx(measured[instrument.cut(0.47).flops])
    between = instrument.cut(0.6)
    points = measured[[instrument.cut(0.47).flops, instrument.cut(0.7).flops]]
    assert points.min() <= between.accuracy <= points.max()
    assert instrument.cut(0.2).accuracy is None
    assert instrument.cut(0.47, instrument.tilted(30, 3.0, 0.0)).accuracy is None


def test_tilting_a_layer_changes_what_it_keeps(instrument):
    before = instrument.cut(0.47).widths
    layer = min(range(55), key=lambda i: before[i] / instrument.graph.widths[i])
    after = instrument.cut(0.47, instrument.tilted(layer, 10.0, 3.0)).widths
    assert after[layer] > before[layer]
    assert sum(a < b for a, b in zip(after, before, strict=True)) > 0
    assert instrument.tilted(layer, 1.0, 0.0) == instrument.ranking


def test_the_controls_redraw_and_say_what_is_missing(instrument):
    controls = Controls(instrument)
    picture, numbers = controls.image.value, controls.numbers.value
    controls.flops.value = 0.3
    assert controls.image.value != picture
    assert controls.numbers.value != numbers
    controls.flops.min = 0.01
    controls.flops.value = 0.01
    assert "the lowest reachable fraction" in controls.numbers.value
    assert controls.button.disabled
    controls.flops.value = 0.47
    assert controls.numbers.value == numbers
    assert not controls.button.disabled
    bundle = controls._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= bundle.keys()


def test_the_button_measures_or_says_what_it_needs(done, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(done)
        controls = Controls(Instrument(workspace("demo", NAME)), 0.5)
        controls.button.click()
        assert "measured test accuracy" in controls.result.value
        images = controls.instrument.space.images
        images.rename(tmp_path / "away")
        try:
            controls.button.click()
        finally:
            (tmp_path / "away").rename(images)
    assert "python -m experiments data --scale demo" in controls.result.value


def test_the_explorer_runs_without_a_screen(done):
    executed = run("explore", done, {"scale": "demo", "flops": 0.5})
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output.output_type in ("stream", "error")]


def test_your_model_leaves_a_set_of_networks(done, tmp_path):
    fast = {"epochs": 1, "finetune_epochs": 1, "evaluations": 4, "fractions": [0.6, 0.3], "folder": str(tmp_path)}
    executed = run("your_model", done, fast)
    assert {p.name for p in tmp_path.glob("resnet18-0.3.*")} == {
        f"resnet18-0.3.{s}" for s in ("safetensors", "json", "onnx")
    }
    outputs = [
        o.data["text/html"] for c in executed.cells for o in c.get("outputs", []) if "text/html" in o.get("data", {})
    ]
    reread, onnx = (table(html) for html in outputs if "largest difference" in html)
    assert len(reread) == len(onnx) == 2
    assert (reread["largest difference"] < 1e-4).all()
    assert (onnx["largest difference"] < 1e-3).all()
    assert (onnx["same class (%)"] == 100).all()


def test_the_movie_shows_the_search(done):
    with Image.open(done / "results" / "demo" / NAME / "figures" / "search.gif") as movie:
        assert movie.n_frames == 6


def test_the_report_is_whole(done):
    page = (done / "results" / "demo" / "report.html").read_text()
    for needed in ("<math", "data:image/png", "data:image/gif", "digits", "1 · The dense network"):
        assert needed in page
    assert page.count('class="chapter"') == 8  # one folded chapter for each network of both experiments
    assert "To play" not in page
    for fetched in ("http://", "<script", 'src="https'):
        assert fetched not in page.replace("http://www.w3.org", "")


def test_the_report_needs_executed_notebooks(done, tmp_path):
    from experiments import report

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(done)
        with pytest.raises(legr.UserError, match="has no executed notebooks"):
            report.build([workspace("demo", NAME, "none")], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
