"""The instrument of explore.ipynb: its arithmetic on committed results, its controls, and what its picture shows."""

import io

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import legr
from experiments.config import open_experiment
from experiments.explorer import Controls, Instrument, describe
from tests.conftest import NAME, PROJECT

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a reader would see it under the controls


@pytest.fixture(scope="module")
def instrument():
    """The committed result, without images: what a fresh clone has."""
    return Instrument(open_experiment("laptop", NAME, "explore", root=PROJECT), "legr-ours")


def test_a_cut_counts_what_pruning_builds(instrument):
    cut = instrument.cut(0.62)
    small = legr.prune(instrument.exp.model, instrument.graph, cut.kept)
    assert cut.params == sum(p.numel() for p in small.parameters())
    assert cut.flops == legr.trace(small, torch.zeros(1, 3, 32, 32)).flops() < 0.62 * instrument.dense_flops
    assert [small.get_submodule(layer.name).out_channels for layer in instrument.graph.layers] == cut.widths


def test_accuracy_is_read_off_measured_networks_only(instrument):
    low, middle, high = (instrument.cut(t) for t in (0.47, 0.6, 0.7))
    first, last = instrument.accuracy[[low.flops, high.flops]]
    share = (middle.flops - low.flops) / (high.flops - low.flops)
    assert middle.accuracy == pytest.approx(first + share * (last - first))
    assert instrument.cut(1.0).accuracy == pytest.approx(instrument.exp.dense["accuracy"])
    assert list(describe(instrument, instrument.cut(0.2)).iloc[0]).count("–") == 2  # nothing was measured there
    tilted = instrument.cut(0.47, instrument.tilted(30, 3.0, 0.0))
    assert tilted.accuracy is None and tilted.latency_ms > 0


def dark(controls):
    """Pixels of the marks: below title and legend, right of and above the labels."""
    pixels = np.asarray(Image.open(io.BytesIO(controls.image.value)).convert("RGB"))[45:190, 60:]
    return int((pixels.max(2) < 60).sum())


def test_tilting_a_layer_moves_widths_and_the_learned_ones_stay_marked(instrument):
    controls = Controls(instrument)
    before, first = controls.cut.widths, dark(controls)
    assert first > 55 * 4  # a mark for each layer
    layer = min(range(55), key=lambda i: before[i] / instrument.graph.widths[i])
    controls.layer.value, controls.scale.value, controls.shift.value = layer, 10.0, 3.0
    after, ranking = controls.cut.widths, controls.ranking
    assert ranking.scale[layer] == pytest.approx(10 * instrument.ranking.scale[layer])
    deviation = instrument.exp.norms[layer].double().numpy().std()
    assert ranking.shift[layer] - instrument.ranking.shift[layer] == pytest.approx(3 * deviation)
    assert after[layer] > before[layer] and any(a < b for a, b in zip(after, before, strict=True))  # others pay
    assert dark(controls) > 0.8 * first
    assert instrument.tilted(layer, 1.0, 0.0) == instrument.ranking


def test_the_controls_redraw_and_say_what_can_not_be_reached(instrument):
    controls = Controls(instrument)
    before, numbers = controls.image.value, controls.numbers.value
    controls.target.value = 0.3
    assert controls.image.value != before and controls.numbers.value != numbers
    controls.target.min = 0.01
    controls.target.value = 0.01
    assert "the lowest reachable fraction" in controls.numbers.value and controls.button.disabled
    controls.target.value = 0.47
    assert controls.numbers.value == numbers and not controls.button.disabled
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= controls._repr_mimebundle_().keys()


@pytest.mark.xdist_group("pipeline")
def test_the_button_measures_the_network_that_is_shown_or_says_what_it_needs(done, tmp_path):
    first, second = (Controls(Instrument(open_experiment("demo", NAME, "x", root=done)), 0.5) for _ in range(2))
    first.button.click()
    table = pd.read_csv(done / "results/demo" / NAME / "sets/legr/networks.csv")
    assert f"<b>{table.accuracy_recalibrated[0]:.2%}</b>" in first.result.value
    first.target.value = 0.6
    assert first.result.value == ""  # that was of another network
    images = second.instrument.exp.images
    images.rename(tmp_path / "away")
    try:
        second.button.click()
    finally:
        (tmp_path / "away").rename(images)
    assert "do not exist; run the data stage" in second.result.value
