"""Eq. 1, LeGR-Pruning and the baselines: against the authors' code, and against a plain re-telling."""

import math

import numpy as np
import pytest
import torch

import legr
from legr.latency import against_dense


@pytest.mark.parametrize(("name", "classes", "side"), [("resnet56", 10, 32), ("mobilenet_v2", 1000, 224)])
def test_every_recorded_selection_is_reproduced(reference, name, classes, side):
    graph = legr.trace(legr.models.build(name, classes, 0), torch.zeros(1, 3, side, side))
    recorded = np.load(reference / f"{name}_selections.npz")
    assert graph.widths == recorded["widths"].tolist()
    norms = torch.from_numpy(recorded["norms"]).split(graph.widths)
    for case, fraction in enumerate(recorded["fraction"]):
        ranking = legr.Ranking(recorded["alpha"][case], recorded["kappa"][case])
        kept = legr.select(graph, ranking.scores(norms), float(fraction))
        assert np.array_equal(torch.cat(kept).numpy(), recorded["keep"][case]), f"case {case}"
        assert graph.flops(kept) == recorded["flops"][case]


def retold(graph, scores, fraction):
    """Fig. 2 step by step: one unit at a time, FLOPs counted afresh after each."""
    importance = np.zeros(graph.unit_count)
    members = [[] for _ in range(graph.unit_count)]
    for layer, (units, score) in enumerate(zip(graph.units, scores, strict=True)):
        for filter_, unit in enumerate(units):
            if unit >= 0:
                importance[unit] += float(score[filter_])
                members[unit].append((layer, filter_))
    kept = [torch.ones(w, dtype=torch.bool) for w in graph.widths]
    for unit in np.argsort(importance, kind="stable"):
        if graph.flops(kept) < fraction * graph.flops():
            return kept
        trial = [k.clone() for k in kept]
        for layer, filter_ in members[unit]:
            trial[layer][filter_] = False
        lost = [w - int(k.sum()) for w, k in zip(graph.widths, trial, strict=True)]
        if all(x <= math.floor(0.9 * w) and w - x >= 2 for x, w in zip(lost, graph.widths, strict=True)):
            kept = trial
    return kept


@pytest.mark.parametrize("fraction", [0.9, 0.5, 0.2])
def test_selection_is_legr_pruning(network, fraction):
    graph = legr.trace(network, torch.zeros(1, 3, 32, 32))
    norms = legr.filter_norms(network, graph)
    generator = np.random.default_rng(0)
    for _ in range(3):
        scores = [float(generator.lognormal()) * n + float(generator.normal()) for n in norms]
        kept = legr.select(graph, scores, fraction)
        assert all(torch.equal(a, b) for a, b in zip(kept, retold(graph, scores, fraction), strict=True))
        assert graph.flops(kept) < fraction * graph.flops()


def test_a_whole_budget_keeps_everything(small):
    model, graph = small
    kept = legr.select(graph, legr.filter_norms(model, graph), 1.0)
    assert all(k.all() for k in kept)


def test_an_unreachable_target_says_the_lowest_reachable_one(small):
    model, graph = small
    norms = legr.filter_norms(model, graph)
    with pytest.raises(
        legr.UserError, match=r"flops is 0.001; the lowest reachable fraction of this network is 0.\d+"
    ) as error:
        legr.select(graph, norms, 0.001)
    lowest = float(str(error.value).rsplit(" ", 1)[1])
    kept = legr.select(graph, norms, lowest)
    assert graph.flops(kept) < lowest * graph.flops()
    for k, width in zip(kept, graph.widths, strict=True):
        assert k.sum() >= max(2, width - math.floor(0.9 * width))
    with pytest.raises(legr.UserError):
        legr.select(graph, norms, lowest - 0.001)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.01, float("nan")])
def test_a_fraction_outside_its_range_is_an_error(small, fraction):
    model, graph = small
    for method in (legr.select, legr.select_uniform):
        with pytest.raises(legr.UserError, match=f"flops is {fraction}"):
            method(graph, legr.filter_norms(model, graph), fraction)


def test_uniform_thins_all_layers_alike(small):
    model, graph = small
    norms = legr.filter_norms(model, graph)
    kept = legr.select_uniform(graph, norms, 0.5)
    shares = [k.float().mean().item() for k in kept]
    assert max(shares) - min(shares) < 0.1
    inner = next(i for i, layer in enumerate(graph.layers) if layer.name == "blocks.0.conv1")
    assert norms[inner][kept[inner]].min() > norms[inner][~kept[inner]].max()


def test_eq_1_and_the_norms(small):
    model, graph = small
    norms = legr.filter_norms(model, graph)
    assert norms[0][3] == pytest.approx((model.conv1.weight[3].double() ** 2).sum().item(), rel=1e-6)
    scores = legr.Ranking([2.0] * 7, [0.5] * 7).scores(norms)
    assert torch.allclose(scores[2], 2 * norms[2].double() + 0.5)


def test_a_ranking_survives_saving(tmp_path):
    ranking = legr.Ranking([0.1, 1 / 3], [-1e-17, 5.0])
    ranking.save(tmp_path / "ranking.json")
    assert legr.Ranking.load(tmp_path / "ranking.json") == ranking


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"scale": [1.0], "shift": [0.0, 1.0]}', "1 scales and 2 shifts"),
        ('{"scale": [NaN], "shift": [0.0]}', "not a finite number"),
        ('{"scale": [1.0]', "is not a JSON object"),
        ('{"scale": ["a"], "shift": [1]}', "is not a JSON object"),
        ("[]", "is not a JSON object"),
    ],
)
def test_a_bad_ranking_file_is_one_sentence(tmp_path, text, message):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(legr.UserError, match=message):
        legr.Ranking.load(tmp_path / "r.json")


def test_a_ranking_for_another_network_is_an_error(small):
    model, graph = small
    with pytest.raises(legr.UserError, match="ranking has 3 layers; this network has 7"):
        legr.Ranking.norm_only(3).scores(legr.filter_norms(model, graph))
    with pytest.raises(legr.UserError, match="ranking .*does not exist"):
        legr.Ranking.load("nowhere.json")


def test_rounding_keeps_what_is_on_the_way_to_the_next_multiple(small):
    model, graph = small
    norms = legr.filter_norms(model, graph)
    kept = legr.select(graph, norms, 0.5, round_to=8)
    assert graph.flops(kept) < 0.5 * graph.flops()
    assert {int(k.sum()) % 8 for k in kept} == {0}
    inner = next(i for i, layer in enumerate(graph.layers) if layer.name == "blocks.2.conv1")
    assert 0 < kept[inner].sum() < len(kept[inner])
    assert norms[inner][kept[inner]].min() > norms[inner][~kept[inner]].max()


def test_a_latency_budget_is_met_as_measured(small):
    """With a stand-in for the clock, so that the result is sure."""
    model, graph = small
    asked = []

    def measure(kept):
        asked.append(0.2 + 0.8 * graph.flops(kept) / graph.flops())
        return asked[-1]

    kept = legr.select(graph, legr.filter_norms(model, graph), latency=0.6, measure=measure)
    assert measure(kept) < 0.6
    assert graph.flops(kept) / graph.flops() == pytest.approx(0.5, abs=0.03)
    assert len(asked) < 15
    with pytest.raises(legr.UserError, match="latency is 0.1; the lowest reachable fraction"):
        legr.select(graph, legr.filter_norms(model, graph), latency=0.1, measure=measure)


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "none of flops, params and latency is given; it must be just one"),
        ({"flops": 0.5, "params": 0.5}, "flops, params of flops, params and latency is given"),
        ({"params": 1.5}, "params is 1.5; it must be a fraction"),
        ({"latency": 0.5}, "latency and measure belong together"),
        ({"flops": 0.5, "measure": len}, "latency and measure belong together"),
        ({"flops": 0.5, "round_to": 0}, "round_to is 0; it must be a whole number, at least 1"),
        ({"flops": 0.5, "round_to": 2.5}, "round_to is 2.5; it must be a whole number"),
    ],
)
def test_a_budget_is_one_thing(small, budget, message):
    model, graph = small
    for method in (legr.select, legr.select_uniform):
        with pytest.raises(legr.UserError, match=message):
            method(graph, legr.filter_norms(model, graph), **budget)


def test_measured_latency_is_a_fraction_of_the_dense_networks(small, compute):
    model, graph = small
    for fused in (False, True):
        ratio = against_dense(model, graph, 32, 4, compute, 3, fused)
        narrow = legr.select(graph, legr.filter_norms(model, graph), 0.2)
        assert ratio(narrow) > 0
