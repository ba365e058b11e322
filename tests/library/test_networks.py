"""Networks that nobody here wrote: torchvision's classifiers and timm's, pruned to half of their FLOPs."""

import pytest
import torch

import legr
from benchmarks.networks import NETWORKS, PAGE, build, try_legr, verdict
from tests.conftest import PROJECT

QUICK = ("resnet18", "mobilenet_v3_small", "squeezenet1_1")
page = (PROJECT / PAGE).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS])
def test_networks_are_pruned_right_or_refused_by_name(name):
    if name.startswith("timm: "):
        pytest.importorskip("timm")
    assert f"\n| {name} | {' | '.join(try_legr(name))} | " in page


def test_the_page_has_all_networks():
    names = [line.split(" | ")[0].strip("| ") for line in page.split("|---|\n")[1].splitlines() if line.startswith("|")]
    assert names == NETWORKS


def test_a_network_that_is_not_the_masked_one_is_found_out():
    model, x = build("resnet18")
    graph = legr.trace(model, x[:1])
    masks = legr.select(graph, legr.filter_norms(model, graph), 0.5)
    units = graph.kept_units(masks)
    kept = {o.module: torch.from_numpy(graph.kept_channels(units, o.outputs)) for o in graph.operations if o.module}
    small = legr.prune(model, graph, masks)
    assert verdict(small, "resnet18", kept) == "yes"
    with torch.no_grad():
        small.layer1.get_submodule("0.bn1").bias[0] += 0.1
    assert verdict(small, "resnet18", kept).startswith("no: differs from the masked dense network by ")
    assert verdict(model, "resnet18", {}) == "no: stays at 100% of the FLOPs"
