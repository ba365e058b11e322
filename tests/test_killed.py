"""SIGKILL at random moments, many times: what comes out in the end is what an undisturbed run gives, bit for bit."""

import json
import math
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

pytestmark = [pytest.mark.slow, pytest.mark.harness, pytest.mark.xdist_group("pipeline")]
FORKED = multiprocessing.get_context("fork")  # all is imported already


def kill_often(work: Callable[[Path], None], tmp_path: Path, kills: int) -> None:
    """`work(folder)` leaves folder/result; killed `kills` times and more, it leaves what it does undisturbed.

    A kill comes within a third of the time that the undisturbed work took, so that there is progress.
    """
    moments, threads, longest, done = drawn_moments(), torch.get_num_threads(), math.inf, 0
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    try:
        for number in range(kills + 1):
            folder, start, code = tmp_path / str(number), time.monotonic(), None
            while code != 0:
                process = FORKED.Process(target=work, args=(folder,))
                process.start()
                process.join(None if longest == math.inf else moments.uniform(0, longest))
                process.kill()
                process.join()
                code = process.exitcode
                assert code in (0, -signal.SIGKILL)
                done += code != 0
            longest = min(longest, (time.monotonic() - start) / 3)
            assert (folder / "result").read_bytes() == (tmp_path / "0/result").read_bytes()
            if done >= kills:
                return
    finally:
        torch.set_num_threads(threads)
    raise AssertionError("it is done before it is killed")


def drawn_moments() -> random.Random:
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"moments drawn with seed {seed}")
    return random.Random(seed)


def test_a_search_killed_a_hundred_times(tmp_path, digits, compute):
    def search(folder: Path) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model = CifarResNet(1)
        graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
        settings = SearchSettings(population=12, evaluations=32, sample=4)
        fitness = FitnessSettings(recalibration_images=250)
        result = learn_ranking(
            model, graph, digits, 0.47, search=settings, fitness=fitness, compute=compute, state_folder=folder / "state"
        )
        history = result.history.drop(columns="seconds").to_dict("list")
        result.ranking.save(folder / "ranking.json")
        (folder / "result").write_text((folder / "ranking.json").read_text() + json.dumps(history))

    kill_often(search, tmp_path, 100)


def test_a_training_killed_twenty_times(tmp_path, digits, compute):
    def training(folder: Path) -> None:
        torch.set_num_threads(1)
        torch.manual_seed(0)
        model, recipe = CifarResNet(1), Recipe(epochs=8, batch_size=32, lr=0.05)
        rows = train(model, digits.fit, recipe, compute, seed=0, state_folder=folder / "state")
        told = rows.drop(columns="seconds").to_dict("list")
        (folder / "result").write_text(tensors_digest(model.state_dict()) + json.dumps(told))

    kill_often(training, tmp_path, 20)
