"""The explorer: its arithmetic on committed results, its controls, and what its picture shows."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import legr
from experiments.config import open_experiment
from experiments.explorer import ACCURACY, Explorer
from tests.conftest import NAME, PROJECT

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a reader would see it under the controls


@pytest.fixture
def explorer():
    """Over the committed result, without images: what a fresh clone has."""
    return Explorer(open_experiment("laptop", NAME, "explore", root=PROJECT), "legr-ours")


def test_a_cut_counts_what_pruning_builds(explorer):
    cut = explorer.cut(0.62)
    small = legr.prune(explorer.exp.model, explorer.graph, cut.kept)
    assert cut.numbers["parameters (thousands)"] == sum(p.numel() for p in small.parameters()) / 1e3
    assert cut.numbers["MFLOPs"] == legr.trace(small, torch.zeros(1, 3, 32, 32)).flops() / 1e6
    assert 61 < cut.numbers["FLOPs / dense (%)"] < 62
    assert [small.get_submodule(layer.name).out_channels for layer in explorer.graph.layers] == cut.widths


def test_accuracy_is_read_off_measured_networks_only(explorer):
    low, middle, high = (explorer.cut(t).numbers for t in (0.47, 0.6, 0.7))
    share = (middle["MFLOPs"] - low["MFLOPs"]) / (high["MFLOPs"] - low["MFLOPs"])
    assert middle[ACCURACY] == pytest.approx(low[ACCURACY] + share * (high[ACCURACY] - low[ACCURACY]))
    assert explorer.cut(1.0).numbers[ACCURACY] == pytest.approx(100 * explorer.exp.dense["accuracy"])
    assert sum(map(np.isnan, explorer.cut(0.2).numbers.values())) == 2  # nothing was measured there
    assert sum(map(np.isnan, explorer.cut(0.47, 30, scale=3.0).numbers.values())) == 1  # the accuracy


def dark(explorer):
    """Pixels of the marks: below title and legend, right of and above the labels."""
    pixels = np.asarray(Image.open(io.BytesIO(explorer.image.value)).convert("RGB"))[28:200, 60:]
    return int((pixels.max(2) < 60).sum())


def test_tilting_a_layer_moves_widths_and_the_learned_ones_stay_marked(explorer):
    before, first = explorer.shown.widths, dark(explorer)
    assert first > 55 * 4  # a mark for each layer
    layer = min(range(55), key=lambda i: before[i] / explorer.graph.widths[i])
    explorer.layer.value, explorer.scale.value, explorer.shift.value = layer, 10.0, 3.0
    after, norms = explorer.shown.widths, explorer.exp.norms
    assert after[layer] > before[layer] and any(a < b for a, b in zip(after, before, strict=True))  # others pay
    assert dark(explorer) > 0.8 * first
    alpha, kappa = list(explorer.learned.scale), list(explorer.learned.shift)
    alpha[layer], kappa[layer] = 10 * alpha[layer], kappa[layer] + 3 * norms[layer].double().numpy().std()
    kept = legr.select(explorer.graph, legr.Ranking(tuple(alpha), tuple(kappa)).scores(norms), 0.47, floor=0.1)
    assert after == [int(mask.sum()) for mask in kept]


def test_the_controls_redraw_and_say_what_can_not_be_reached(explorer):
    before, numbers = explorer.image.value, explorer.numbers.value
    explorer.target.value = 0.3
    assert explorer.image.value != before and explorer.numbers.value != numbers
    explorer.target.min = 0.01
    explorer.target.value = 0.01
    assert "the lowest reachable fraction" in explorer.numbers.value and explorer.button.disabled
    explorer.target.value = 0.47
    assert explorer.numbers.value == numbers and not explorer.button.disabled
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= explorer._repr_mimebundle_().keys()


@pytest.mark.xdist_group("pipeline")
def test_the_button_measures_the_network_that_is_shown_or_says_what_it_needs(done, tmp_path):
    first, second = (Explorer(open_experiment("demo", NAME, "x", root=done), target=0.5) for _ in range(2))
    first.button.click()
    table = pd.read_csv(done / "results/demo" / NAME / "sets/legr/networks.csv")
    assert f"<b>{table.accuracy_recalibrated[0]:.2%}</b>" in first.result.value
    first.target.value = 0.6
    assert first.result.value == ""  # that was of another network
    images = second.exp.images.rename(tmp_path / "away")
    try:
        second.button.click()
    finally:
        images.rename(second.exp.images)
    assert "do not exist; run the data stage" in second.result.value
