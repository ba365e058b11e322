"""Algorithm 1: what it draws, and that it can be interrupted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import legr
from legr import search as search_module
from legr.fitness import Fitness, FitnessSettings
from legr.search import Evolution, FinalistSettings, SearchSettings, learn_ranking
from legr.training import Recipe, evaluate, train

SHORT = SearchSettings(population=6, evaluations=15, sample=3)


def told(evolution):
    """All candidates of a search with a cheap loss: how far log α is from a fixed direction."""
    while not evolution.done:
        candidate = evolution.ask()
        evolution.tell(candidate, float(np.abs(np.log(candidate.scale) - 0.5).sum()), 0.0)
    return evolution.candidates


@pytest.fixture
def norms():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(8, generator=generator) * (i + 1) for i in range(55)]  # as many layers as ResNet-56 has


def test_candidates_follow_algorithm_1(norms):
    evolution = Evolution(norms, SearchSettings(population=20, evaluations=200, sample=4))
    asked = told(evolution)
    assert len(asked) == 200
    assert asked[19] == legr.Ranking.norm_only(55)
    scales = np.log([c.scale for c in asked[:19]])
    assert abs(scales.mean()) < 0.15
    assert abs(scales.std() - 1) < 0.1
    shifts = np.array([c.shift for c in asked[:19]]) / evolution.deviations
    assert abs(shifts.std() - 1) < 0.1
    changed = []  # a mutant differs from a living parent in int(0.1 · 55) layers; fewer where one is drawn twice
    for i, child in enumerate(asked[20:], 20):
        parents = asked[i - 20 : i]
        changed.append(min(sum(a != b for a, b in zip(child.scale, p.scale, strict=True)) for p in parents))
    assert min(changed) >= 1 and max(changed) == 5
    losses = [row["loss"] for row in evolution.history]
    assert [row["best"] for row in evolution.history] == np.minimum.accumulate(losses).tolist()
    assert losses[asked.index(evolution.best)] == min(losses)
    assert min(losses) < 0.85 * min(losses[:20])


def test_a_loss_that_is_no_number_is_the_worst(norms):
    evolution = Evolution(norms, SHORT)
    for loss in (float("nan"), 3.0, float("inf")):
        evolution.tell(evolution.ask(), loss, 0.0)
    assert evolution.best == evolution.candidates[1]
    assert np.isfinite([row["loss"] for row in evolution.history]).all()


def test_a_search_goes_on_from_a_ranking(norms):
    start = legr.Ranking(tuple(range(1, 56)), (0.5,) * 55)
    asked = told(Evolution(norms, SHORT, start))
    assert asked[0] == start
    for mutant in asked[1:5]:
        assert 1 <= sum(a != b for a, b in zip(mutant.scale, start.scale, strict=True)) <= 5
    assert asked[5] == legr.Ranking.norm_only(55)
    assert len(set(asked)) == 15


def learned(small, digits, compute, folder=None, log=None, flops=0.6, floor=0.1, fitness=None, **search):
    """A search with networks: its ranking, its candidates and what it measured."""
    settings = SearchSettings(**{"population": 4, "evaluations": 7, "sample": 2} | search)
    fitness = FitnessSettings(**{"validation_images": 64} | (fitness or {}))
    options = {"compute": compute, "floor": floor, "state_folder": folder, "log": log}
    result = learn_ranking(*small, digits, flops, search=settings, fitness=fitness, **options)
    return result.ranking, result.candidates, result.history.drop(columns="seconds").to_dict("list")


def test_interrupted_at_every_network_it_ends_with_the_same_ranking(small, digits, compute, tmp_path, monkeypatch):
    judge, judged, at_most = Fitness.__call__, [], 100

    def interrupted(self, networks):
        if len(judged) == at_most:
            raise KeyboardInterrupt
        judged.append(networks)
        return judge(self, networks)

    def search(folder=tmp_path, **options):
        judged.clear()
        return learned(small, digits, compute, folder, fitness={"steps": 2, "batch_size": 16}, **options)

    monkeypatch.setattr(Fitness, "__call__", interrupted)
    expected = search(None)
    networks, at_most = len(judged), 1
    for _ in range(networks - 1):
        with pytest.raises(KeyboardInterrupt):
            search()
    assert search() == expected and len(judged) == 1
    at_most = 0
    assert search() == expected  # what is done is not done again
    with pytest.raises(KeyboardInterrupt):  # what depends on something else is
        search(floor=0.2)
    for part, attribute, value in (
        (search_module, "code_digest", lambda: "other"),
        (small[0].conv1.weight, "requires_grad", False),
    ):
        with monkeypatch.context() as changed, pytest.raises(KeyboardInterrupt):  # other code, another computation
            changed.setattr(part, attribute, value)
            search()
    (path,) = tmp_path.iterdir()
    for spoilt in (b"", b'{"a": {"loss": 1.0', b'{"a": {"loss": 1.0}}', b"[1]", b"\xff"):
        path.write_bytes(spoilt)
        with pytest.raises(legr.UserError, match="search state .* is corrupt; delete it"):
            search()


def test_a_network_that_comes_again_is_evaluated_once(small, digits, compute, monkeypatch):
    """And the search is the one that evaluates it every time."""
    judge = Fitness(*small, digits, [0.6], FitnessSettings(validation_images=64), compute)
    search, evaluated = {"population": 6, "evaluations": 40, "sample": 3}, []
    plain = Evolution(judge.norms, SearchSettings(**search))
    while not plain.done:
        candidate = plain.ask()
        plain.tell(candidate, **judge(judge.select(candidate)))

    def noted(self, networks):
        evaluated.append(torch.cat(networks[0]).numpy().tobytes())
        return judge(networks)

    judging = Fitness.__call__
    monkeypatch.setattr(Fitness, "__call__", lambda self, n: noted(self, n) if self is not judge else judging(self, n))
    ranking, candidates, history = learned(small, digits, compute, **search)
    assert (ranking, candidates) == (plain.best, plain.candidates)
    assert history["loss"] == [row["loss"] for row in plain.history]
    keys = [torch.cat(judge.select(c)[0]).numpy().tobytes() for c in plain.candidates]
    assert evaluated == list(dict.fromkeys(keys))
    assert len(evaluated) < 40


def test_a_second_look_trains_the_best_candidates_and_norm_only(small, digits, compute, tmp_path):
    settings = SearchSettings(population=4, evaluations=8, sample=2)
    fitness, recipe = FitnessSettings(validation_images=64), Recipe(epochs=1, batch_size=64, lr=0.01)
    finalists = FinalistSettings(count=2, targets=(0.7, 0.6), recipe=recipe)
    options = {"search": settings, "fitness": fitness, "compute": compute, "state_folder": tmp_path}
    plain = learn_ranking(*small, digits, 0.6, **options)
    assert plain.finalists is None and plain.ranking == plain.candidates[plain.history.loss.argmin()]
    result = learn_ranking(*small, digits, 0.6, finalists=finalists, **options)
    assert result.candidates == plain.candidates
    table = result.finalists
    assert len(table) == 3 and result.candidates[table.candidate[0]] == legr.Ranking.norm_only(len(small[1].layers))
    assert table.loss[1:].is_monotonic_increasing and table.loss.min() == result.history.loss.min()
    winner = result.candidates[table.candidate[table.accuracy.idxmax()]]
    assert result.ranking == winner
    accuracies = []
    for target in finalists.targets:
        norms = legr.filter_norms(*small)
        network = legr.prune(*small, legr.select(small[1], winner.scores(norms), target))
        train(network, digits.fit, recipe, compute, seed=0)
        accuracies.append(evaluate(network, digits.holdout, compute)["accuracy"])
    assert table.accuracy.max() == pytest.approx(sum(accuracies) / 2)
    assert 3 < len(list(tmp_path.glob("training-*.pt"))) <= 3 * 2  # a network may be that of two rankings
    again = learn_ranking(*small, digits, 0.6, finalists=finalists, **options)
    assert again.finalists.equals(table) and (table.seconds > 0).all()


@pytest.mark.parametrize(
    ("classes", "target", "why"),
    [(10, 1.0, "cut the same network"), (1, 0.6, "have the loss 0 on 64 images of 1 classes")],
)
def test_where_nothing_is_decided_the_ranking_is_norm_only_and_says_why(small, digits, compute, classes, target, why):
    model, graph = small
    if classes == 1:
        model.linear = nn.Linear(64, 1)
        graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
        train, test = (replace(images, labels=images.labels * 0) for images in (digits.train, digits.test))
        digits = replace(digits, classes=["digit"], train=train, test=test)
    with pytest.warns(UserWarning, match=f"all candidates of the search {why}, so the ranking is norm-only"):
        ranking, *_ = learned((model, graph), digits, compute, flops=target)
    assert ranking == legr.Ranking.norm_only(7)


def test_targets_may_be_numpys(small, digits, compute):
    expected = learned(small, digits, compute, flops=[0.5, 0.7])
    assert learned(small, digits, compute, flops=np.array([0.7, 0.5])) == expected
