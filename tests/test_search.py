"""Algorithm 1: what it draws, that it can be killed, and that it finds something."""

import copy
import json
import math
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

import legr
from legr.fitness import Fitness, FitnessSettings
from legr.search import Evolution, SearchSettings, learn_ranking
from legr.training import Recipe, train

SHORT = SearchSettings(population=6, evaluations=15, sample=3)


def run(evolution, until=None):
    """Drive a search with a loss that is cheap: the distance of log α from a fixed direction."""
    asked = []
    while not evolution.done and len(asked) != until:
        candidate = evolution.ask()
        asked.append(candidate)
        evolution.tell(candidate, float(np.abs(np.log(candidate.scale) - 0.5).sum()), 0.0)
    return asked


@pytest.fixture
def norms():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(8, generator=generator) * (i + 1) for i in range(30)]


def test_defaults_are_the_papers():
    assert SearchSettings() == SearchSettings(population=64, evaluations=400, sample=16)
    assert FitnessSettings().kind == "loss"


def test_candidates_follow_algorithm_1(norms):
    settings = SearchSettings(population=20, evaluations=200, sample=4)
    evolution = Evolution(norms, settings)
    asked = run(evolution)
    assert len(asked) == 200
    assert asked[19] == legr.Ranking.norm_only(30)
    scales = np.log([c.scale for c in asked[:19]])
    assert abs(scales.mean()) < 0.15
    assert abs(scales.std() - 1) < 0.1
    shifts = np.array([c.shift for c in asked[:19]]) / evolution.deviations
    assert abs(shifts.std() - 1) < 0.1
    for i, child in enumerate(asked[20:], 20):  # a mutant differs from a living parent in at most 10% of the layers
        parents = asked[i - 20 : i]
        changed = min(sum(a != b for a, b in zip(child.scale, parent.scale, strict=True)) for parent in parents)
        assert 1 <= changed <= 3
    assert len(evolution.population) == 20
    losses = [row["loss"] for row in evolution.history]
    assert [row["best"] for row in evolution.history] == np.minimum.accumulate(losses).tolist()
    assert losses[asked.index(evolution.best)] == min(losses)
    assert min(losses) < 0.85 * min(losses[:20])


def test_mutations_shrink_to_a_fifth(norms):
    evolution = Evolution(norms, SearchSettings(population=20, evaluations=400, sample=4))
    asked = run(evolution)

    def typical(part):
        steps = []
        for i in part:
            change = np.log(asked[i].scale) - np.log([p.scale for p in asked[i - 20 : i]])
            nearest = change[np.argmin((change != 0).sum(1))]
            steps.append(np.abs(nearest[nearest != 0]).mean())
        return np.mean(steps)

    assert typical(range(20, 100)) > 2 * typical(range(320, 400))


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 14])
def test_a_restored_search_goes_on_as_if_undisturbed(norms, stop):
    whole = run(Evolution(norms, SHORT))
    first = Evolution(norms, SHORT)
    run(first, until=stop)
    state = json.loads(json.dumps(first.state()))
    second = Evolution(norms, SHORT)
    second.restore(state)
    assert run(second) == whole[stop:]


@pytest.mark.parametrize("kind", ["loss", "recalibrated", "steps"])
def test_every_fitness_resumes_to_the_identical_ranking(small, digits, compute, tmp_path, kind):
    model, graph = small
    fitness = FitnessSettings(kind=kind, recalibration_images=64, validation_images=64, steps=2, batch_size=16)
    settings = SearchSettings(population=3, evaluations=6, sample=2)

    class Killed(Exception):
        pass

    def stop(row):
        if row["evaluation"] == 4:
            raise Killed

    with pytest.raises(Killed):
        learn_ranking(model, graph, digits, 0.6, settings, fitness, compute, tmp_path, stop)
    seen = []
    resumed = learn_ranking(model, graph, digits, 0.6, settings, fitness, compute, tmp_path, seen.append)
    assert [row["evaluation"] for row in seen] == [5, 6]
    whole = learn_ranking(model, graph, digits, 0.6, settings, fitness, compute)
    assert resumed.ranking == whole.ranking
    assert resumed.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds"))
    other = learn_ranking(model, graph, digits, 0.6, settings.model_copy(update={"seed": 1}), fitness, compute)
    assert other.ranking != whole.ranking


def test_a_state_serves_only_what_it_depends_on(small, digits, compute, tmp_path):
    model, graph = small
    fitness = FitnessSettings(validation_images=32)
    settings = SearchSettings(population=2, evaluations=2, sample=1)
    for flops in (0.6, 0.7):
        seen = []
        learn_ranking(model, graph, digits, flops, settings, fitness, compute, tmp_path, seen.append)
        assert len(seen) == 2
    assert len(list(tmp_path.iterdir())) == 2


def test_recalibration_changes_statistics_not_weights(small, digits, compute):
    model, graph = small
    judges = {
        k: Fitness(
            model, graph, digits, 0.6, FitnessSettings(kind=k, recalibration_images=64, steps=2, batch_size=16), compute
        )
        for k in ("loss", "recalibrated", "steps")
    }
    ranking = legr.Ranking.norm_only(7)
    weights = {k: dict(j.network(ranking).named_parameters()) for k, j in judges.items()}
    means = {k: j.network(ranking).get_buffer("bn1.running_mean") for k, j in judges.items()}
    assert all(torch.equal(weights["loss"][n], weights["recalibrated"][n]) for n in weights["loss"])
    assert not torch.equal(means["loss"], means["recalibrated"])
    assert not torch.equal(weights["loss"]["conv1.weight"], weights["steps"]["conv1.weight"])


def test_a_search_goes_on_from_a_ranking(norms):
    start = legr.Ranking(tuple(range(1, 31)), (0.5,) * 30)
    evolution = Evolution(norms, SearchSettings(population=6, evaluations=15, sample=3), start)
    asked = run(evolution)
    assert asked[0] == start
    for mutant in asked[1:5]:
        assert 1 <= sum(a != b for a, b in zip(mutant.scale, start.scale, strict=True)) <= 3
    assert asked[5] == legr.Ranking.norm_only(30)
    assert len(set(asked)) == 15


@pytest.mark.parametrize("in_flight", [1, 2, 5])
@pytest.mark.parametrize("stop", [1, 7, 14])
def test_a_search_with_several_in_flight_is_restored_with_them(norms, in_flight, stop):
    settings = SearchSettings(population=6, evaluations=15, sample=3, in_flight=in_flight)

    def drive(evolution, until=15):
        while len(evolution.history) < until:
            while len(evolution.pending) < in_flight and evolution.asked < 15:
                evolution.ask()
            candidate = evolution.pending[0]
            evolution.tell(candidate, float(np.abs(np.log(candidate.scale) - 0.5).sum()), 0.0)
        return evolution

    whole, first, second = (Evolution(norms, settings) for _ in range(3))
    drive(whole)
    second.restore(json.loads(json.dumps(drive(first, stop).state())))
    assert len(second.pending) == in_flight - 1 or stop > 10
    assert drive(second).candidates == whole.candidates
    assert len(set(whole.candidates)) == 15


def test_a_ranking_is_judged_at_several_flop_counts(small, digits, compute, monkeypatch):
    model, graph = small
    model = copy.deepcopy(model)
    train(model, digits.fit, Recipe(epochs=3, batch_size=32, lr=0.05, flip=False), compute, seed=0)
    ranking, guess = legr.Ranking.norm_only(7), math.log(10)

    def judge(flops, **settings):
        settings = FitnessSettings(recalibration_images=64, validation_images=64, **settings)
        return Fitness(model, graph, digits, flops, settings, compute)

    single = [judge(f, kind="recalibrated")(ranking) for f in (0.95, 0.3)]
    assert single[0]["loss"] < guess < single[1]["loss"]
    both = judge(0.3, kind="recalibrated", also_at=(0.95,))(ranking)
    assert both == {"loss": (single[0]["loss"] + guess) / 2, "accuracy": single[0]["accuracy"]}
    assert judge(0.3, kind="loss", also_at=(0.95,))(ranking) == judge(0.3, kind="loss")(ranking)

    lost = judge(0.3, kind="recalibrated", also_at=(0.95, 0.6))
    torch.nn.init.constant_(lost.model.linear.bias[:1], 50)  # it says 0 to everything
    tried, real = [], lost.network
    monkeypatch.setattr(lost, "network", lambda r, flops: tried.append(flops) or real(r, flops))
    assert lost(ranking)["loss"] == pytest.approx(guess)
    assert tried == [0.95]  # smaller networks of a ranking that is lost already are not tried


def test_killed_at_a_random_moment_it_ends_with_the_same_ranking(tmp_path):
    script = tmp_path / "search.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import torch
        from experiments.datasets import DataSettings, prepare
        import legr
        from legr import data
        from legr.fitness import FitnessSettings
        from legr.models import CifarResNet
        from legr.search import SearchSettings
        from legr.training import Compute
        torch.manual_seed(0)
        torch.set_num_threads(1)
        from pathlib import Path
        folder = Path(sys.argv[1])
        if not (folder / "d").exists():
            prepare(DataSettings(name="digits", holdout=100), folder, folder / "d")
        model = CifarResNet(1)
        graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
        result = legr.learn_ranking(model, graph, data.load(folder / "d"), 0.6,
            SearchSettings(population=5, evaluations=40, sample=2), FitnessSettings(validation_images=50),
            Compute(device="cpu", precision="float32"), folder / "state",
            lambda row: print(row["evaluation"], flush=True))
        result.ranking.save(folder / "ranking.json")
        """)
    )
    generator = np.random.default_rng()
    killed = tmp_path / "killed"
    killed.mkdir()
    interruptions = 0
    for _ in range(3):
        process = subprocess.Popen([sys.executable, script, killed], stdout=subprocess.PIPE, text=True)
        process.stdout.readline()
        time.sleep(generator.uniform(0, 0.4))
        process.send_signal(signal.SIGKILL)
        interruptions += process.wait() == -signal.SIGKILL
    assert interruptions
    whole = tmp_path / "whole"
    whole.mkdir()
    for folder in (killed, whole):
        subprocess.run([sys.executable, script, folder], check=True, stdout=subprocess.DEVNULL)
    assert (killed / "ranking.json").read_bytes() == (whole / "ranking.json").read_bytes()


def test_a_corrupt_state_is_one_sentence(small, digits, compute, tmp_path):
    model, graph = small
    settings = SearchSettings(population=2, evaluations=2, sample=1)
    arguments = (model, graph, digits, 0.6, settings, FitnessSettings(validation_images=32), compute, tmp_path)
    learn_ranking(*arguments)
    path = next(tmp_path.iterdir())
    path.write_text(path.read_text()[:50])
    with pytest.raises(legr.UserError, match="search state .* is corrupt"):
        learn_ranking(*arguments)


@pytest.mark.parametrize("racing", [0, 0.1])
def test_a_network_is_judged_once(small, digits, compute, monkeypatch, racing):
    """And the search is the one that judges it every time it comes."""
    model, graph = small
    settings = SearchSettings(population=6, evaluations=40, sample=3)
    fitness = Fitness(model, graph, digits, 0.6, FitnessSettings(), compute)
    plain = Evolution(fitness.norms, settings)
    while not plain.done:
        candidate = plain.ask()
        plain.tell(candidate, **fitness(candidate))
    judged, judge = [], Fitness._ready
    monkeypatch.setattr(Fitness, "_ready", lambda self, *which: judged.append(which) or judge(self, *which))
    raced = settings.model_copy(update={"racing": racing})
    result = learn_ranking(model, graph, digits, 0.6, raced, FitnessSettings(), compute)
    history = result.history
    assert result.candidates == plain.candidates
    assert result.ranking == plain.best
    assert len(judged) == history.network.nunique() < 40
    same = history.loc[history.network - 1, ["loss", "accuracy", "images"]].reset_index(drop=True)
    assert same.equals(history[["loss", "accuracy", "images"]])
    if not racing:
        assert history.loss.tolist() == [row["loss"] for row in plain.history]
