"""Eq. 1, LeGR-Pruning and the baselines: against the authors' code, and against a plain re-telling."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

import legr
from tests.conftest import Inverted

REFERENCE = os.environ.get("LEGR_REFERENCE")  # recorded selections of the authors' code; not part of the package


@pytest.mark.parametrize(("name", "classes", "side"), [("resnet56", 10, 32), ("mobilenet_v2", 1000, 224)])
@pytest.mark.skipif(not REFERENCE, reason="LEGR_REFERENCE does not name a folder with the recorded selections")
def test_every_recorded_selection_is_reproduced(name, classes, side):
    graph = legr.trace(legr.models.build(name, classes, 0), torch.zeros(1, 3, side, side))
    recorded = np.load(Path(REFERENCE) / f"{name}_selections.npz")
    assert graph.widths == recorded["widths"].tolist()
    norms = torch.from_numpy(recorded["norms"]).split(graph.widths)
    for case, fraction in enumerate(recorded["fraction"]):
        ranking = legr.Ranking(recorded["alpha"][case], recorded["kappa"][case])
        kept = legr.select(graph, ranking.scores(norms), float(fraction))
        assert np.array_equal(torch.cat(kept).numpy(), recorded["keep"][case]), f"case {case}"
        assert graph.flops(kept) == recorded["flops"][case]


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
    with pytest.raises(legr.UserError, match="ranking has 3 layers; this network has 7"):
        legr.Ranking.norm_only(3).scores(norms)
    model.blocks[1].conv2.weight.data[3, 0, 0, 0] = torch.inf
    with pytest.raises(legr.UserError, match="layer blocks.1.conv2 has weights that are not finite numbers"):
        legr.filter_norms(model, graph)


@pytest.mark.parametrize("as_given", [lambda t: t.numpy(), lambda t: t.tolist(), lambda t: t.half()])
def test_arrays_lists_and_tensors_of_one_number_are_taken(small, as_given):
    model, graph = small
    given = [as_given(norm.round()) for norm in legr.filter_norms(model, graph)]
    for select in (legr.select, legr.select_uniform):
        expected = select(graph, [norm.round() for norm in legr.filter_norms(model, graph)], 0.5)
        for target in (torch.tensor(0.5), np.array(0.5), np.float32(0.5)):
            assert all(map(torch.equal, expected, select(graph, given, target)))
    masks = [as_given(mask.int()) for mask in expected]
    assert graph.flops(masks) == graph.flops(expected)
    assert set(legr.prune(model, graph, masks).state_dict()) == set(model.state_dict())
    ranking = legr.Ranking(as_given(torch.ones(7)), torch.zeros(7))
    assert ranking == legr.Ranking.norm_only(7)
    assert [score.tolist() for score in ranking.scores(given)] == [np.asarray(norm).tolist() for norm in given]


def test_a_ranking_of_no_numbers_and_masks_of_others_are_refused(small):
    for wrong in (2.0, "12", None, [[1.0, 2.0]], [1.0, "a"], [float("nan")]):
        with pytest.raises(legr.UserError, match="ranking scale (is of type|is not one number per layer)"):
            legr.Ranking(wrong, [0.0])
    masks = [torch.full((width,), 2) for width in small[1].widths]
    with pytest.raises(legr.UserError, match="kept has a value that is neither True nor False"):
        legr.prune(*small, masks)


def test_a_ranking_survives_saving(tmp_path):
    ranking = legr.Ranking([0.1, 1 / 3], [-1e-17, 5.0])
    ranking.save(tmp_path / "ranking.json")
    assert legr.Ranking.load(tmp_path / "ranking.json") == ranking


def test_a_target_for_a_latency_is_met_as_measured(small):
    """With a stand-in for the clock, in milliseconds, so that the result is sure."""
    model, graph = small
    asked = []

    def latency(kept):
        asked.append(2 + 8 * graph.flops(kept) / graph.flops())
        return asked[-1]

    kept = legr.select(graph, legr.filter_norms(model, graph), target=0.6, cost=latency)
    assert latency(kept) < 6
    assert graph.flops(kept) / graph.flops() == pytest.approx(0.5, abs=0.03)
    assert len(asked) < 15
    with pytest.raises(legr.UserError, match="target is 0.1; the lowest reachable fraction"):
        legr.select(graph, legr.filter_norms(model, graph), target=0.1, cost=latency)
    with pytest.raises(legr.UserError, match=r"target is 0.001; the lowest reachable fraction of this network is 0"):
        legr.select_uniform(graph, legr.filter_norms(model, graph), target=0.001, cost=graph.params)


@pytest.mark.parametrize("method", [legr.select, legr.select_uniform])
def test_layers_to_keep_stay_whole_with_all_that_is_coupled(method):
    model = Inverted()
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
    norms = legr.filter_norms(model, graph)
    kept = dict(zip([layer.name for layer in graph.layers], method(graph, norms, 0.7, keep=["stem.0"]), strict=True))
    assert kept["stem.0"].all() and kept["project.0"].all()  # joined by the residual connection
    assert not kept["expand.0"].all()
    with pytest.raises(
        legr.UserError, match="keep names 'stem'; it must be a list of prunable layers, such as \\['stem.0'\\]"
    ):
        method(graph, norms, 0.7, keep=["stem"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[({"target": value}, f"target is {value}; it must be a fraction") for value in (0, -0.1, 1.01, float("nan"))],
        ({"target": 1.5, "cost": len}, "target is 1.5; it must be a fraction"),
        ({"floor": 1}, "floor is 1; it must be at least 0 and below 1"),
        ({"floor": -0.1}, "floor is -0.1; it must be"),
        ({"scores": [torch.zeros(3)] * 7}, r"for layer conv1 has shape \[3\]; it must be \[16\]"),
        ({"target": torch.tensor(1.5)}, "target is 1.5; it must be a fraction"),
        ({"target": "0.5"}, "target is 0.5; it must be a fraction"),
        ({"scores": None}, "(scores|norms) is of type NoneType; it must be a list with one tensor per layer"),
        ({"scores": ["a"] * 7}, "for layer conv1 is of type str; it must be a tensor or array of real numbers"),
        ({"scores": [torch.tensor([torch.nan] * w) for w in (16, 16, 16, 32, 32, 64, 64)]}, "not a finite number"),
    ],
)
def test_a_wrong_argument_is_one_sentence(small, arguments, message):
    model, graph = small
    scores = arguments.pop("scores", legr.filter_norms(model, graph))
    for method in (legr.select, legr.select_uniform):
        with pytest.raises(legr.UserError, match=message):
            method(graph, scores, **({"target": 0.5} | arguments))
