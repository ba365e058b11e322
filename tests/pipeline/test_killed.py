"""SIGKILL at random moments, many times: what comes out in the end is what an undisturbed run gives, bit for bit."""

import importlib
import json
import multiprocessing
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import legr
from legr.files import tensors_digest
from legr.fitness import FitnessSettings
from legr.models import CifarResNet
from legr.search import SearchSettings, learn_ranking
from legr.training import Recipe, train

pytestmark = pytest.mark.slow
FORKED = multiprocessing.get_context("fork")  # all is imported already...
importlib.import_module("torch._dynamo")  # ...this, too, for which optimizers would take seconds in each process


def kill_often(work: Callable[[Path], None], tmp_path: Path, kills: int) -> None:
    """`work(folder)` leaves folder/result; killed `kills` times, at any moment, it leaves what it does undisturbed."""
    moments, threads, folders, killed = drawn_moments(), torch.get_num_threads(), 1, 0
    torch.set_num_threads(1)  # a forked process has none of its parent's threads

    def run(folder: Path, seconds: float | None = None) -> bytes | None:
        """The result, if the work has ended within so many seconds."""
        process = FORKED.Process(target=work, args=(folder,))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return (folder / "result").read_bytes() if process.exitcode == 0 else None

    try:
        start = time.monotonic()
        expected = run(tmp_path / "undisturbed")
        whole = time.monotonic() - start
        while killed < kills:
            found = run(tmp_path / f"{folders}", moments.uniform(0, whole))
            assert found in (None, expected)
            killed += found is None
            folders += found is not None
        assert run(tmp_path / f"{folders}") == expected
    finally:
        torch.set_num_threads(threads)


def drawn_moments() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"moments drawn with seed {seed}")
    return random.Random(seed)


def test_a_search_killed_twenty_times(tmp_path, digits, compute):
    torch.manual_seed(0)
    model = CifarResNet(1)
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))

    def search(folder: Path) -> None:
        torch.set_num_threads(1)
        settings = SearchSettings(population=6, evaluations=16, sample=3)
        fitness = FitnessSettings(recalibration_images=100)
        result = learn_ranking(
            model, graph, digits, 0.47, search=settings, fitness=fitness, compute=compute, state_folder=folder / "state"
        )
        history = result.history.drop(columns="seconds").to_dict("list")
        result.ranking.save(folder / "ranking.json")
        (folder / "result").write_text((folder / "ranking.json").read_text() + json.dumps(history))

    kill_often(search, tmp_path, 20)


def test_a_training_killed_ten_times(tmp_path, digits, compute):
    def training(folder: Path) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model, recipe = CifarResNet(1), Recipe(epochs=6, batch_size=32, lr=0.05)
        rows = train(model, digits.fit[:320], recipe, compute, seed=0, state_folder=folder / "state")
        told = rows.drop(columns="seconds").to_dict("list")
        (folder / "result").write_text(tensors_digest(model.state_dict()) + json.dumps(told))

    kill_often(training, tmp_path, 10)
