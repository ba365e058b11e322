"""SIGKILL at random moments, many times: what comes out in the end is what an undisturbed run gives, bit for bit."""

import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

import legr
from legr.fitness import FitnessSettings
from legr.models import CifarResNet
from legr.search import SearchSettings, learn_ranking
from legr.state import tensors_digest
from legr.training import Recipe, train
from tests.conftest import NAME, PHOTOS

pytestmark = [pytest.mark.slow, pytest.mark.harness]
FORKED = multiprocessing.get_context("fork")  # all is imported already


def survive(work: Callable[[Path], None], folder: Path, longest: float, moments: random.Random) -> int:
    """Run `work(folder)` in a process that is killed after at most `longest` seconds, until it ends; the kills."""
    kills = 0
    while True:
        process = FORKED.Process(target=work, args=(folder,))
        process.start()
        process.join(None if longest == math.inf else moments.uniform(0, longest))
        process.kill()
        process.join()
        if process.exitcode == 0:
            return kills
        assert process.exitcode == -signal.SIGKILL
        kills += 1


def kill_often(work, tmp_path, kills: int) -> None:
    """`work(folder)` leaves folder/result; killed `kills` times and more, it leaves what it does undisturbed.

    A kill comes within a third of the time that the undisturbed work took, so that there is progress.
    """
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"moments drawn with seed {seed}")
    moments, threads = random.Random(seed), torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has none of its parent's threads
    try:
        whole = tmp_path / "whole"
        start = time.monotonic()
        survive(work, whole, math.inf, moments)
        longest = (time.monotonic() - start) / 3
        done, number = 0, 0
        while done < kills:
            folder = tmp_path / f"killed{number}"
            done += survive(work, folder, longest, moments)
            assert (folder / "result").read_bytes() == (whole / "result").read_bytes()
            number += 1
    finally:
        torch.set_num_threads(threads)


def network(blocks: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    return CifarResNet(blocks)


def test_a_search_killed_a_hundred_times(tmp_path, digits, compute):
    def search(folder: Path) -> None:
        torch.set_num_threads(1)
        model = network()
        graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
        own = compute.model_copy(update={"threads": 1})
        settings = SearchSettings(population=12, evaluations=32, sample=4, in_flight=2, racing=0.2)  # demo's sizes
        fitness = FitnessSettings(kind="recalibrated", recalibration_images=250)
        result = learn_ranking(model, graph, digits, 0.47, settings, fitness, own, folder / "state")
        history = result.history.drop(columns="seconds").to_dict("list")
        result.ranking.save(folder / "ranking.json")
        (folder / "result").write_text((folder / "ranking.json").read_text() + json.dumps(history))

    kill_often(search, tmp_path, 100)


def test_a_training_killed_twenty_times(tmp_path, digits, compute):
    def training(folder: Path) -> None:
        torch.set_num_threads(1)
        model, recipe = network(), Recipe(epochs=8, batch_size=32, lr=0.05, flip=False)
        own = compute.model_copy(update={"threads": 1})
        rows = train(model, digits.fit, recipe, own, seed=0, state_folder=folder / "state")
        told = rows.drop(columns="seconds").to_dict("list")
        (folder / "result").write_text(tensors_digest(model.state_dict()) + json.dumps(told))

    kill_often(training, tmp_path, 20)


MEASURED = {"latency.csv", "metrics.json"}  # of wall-clock time


def outcome(folder: Path) -> dict[str, str]:
    """What the pipeline left, less what the clock says."""
    found = {}
    for name in (NAME, PHOTOS):
        results = folder / "results" / "demo" / name
        for path in sorted([*results.glob("*.*"), *results.glob("networks/*.json")]):
            if path.suffix == ".csv":
                table = pd.read_csv(path)
                found[str(path.relative_to(folder))] = table[[c for c in table if not is_time(c)]].to_csv()
            elif path.suffix == ".json":
                found[str(path.relative_to(folder))] = json.dumps(without_times(json.loads(path.read_text())))
            else:
                found[str(path.relative_to(folder))] = path.read_bytes().hex()
        for path in sorted((folder / "checkpoints" / "demo" / name).rglob("*.safetensors")):
            found[str(path.relative_to(folder))] = path.read_bytes().hex()
    return {name: value for name, value in found.items() if Path(name).name not in MEASURED}


def is_time(name: str) -> bool:
    return "latency" in name or "seconds" in name


def without_times(value):
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not is_time(k)}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def test_a_pipeline_killed_twenty_times(done, tmp_path):
    folder = tmp_path / "project"
    folder.mkdir()
    for name in ("legr", "experiments", "notebooks"):
        shutil.copytree(done / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(done / name, folder / name)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path}
    dvc = [sys.executable, "-m", "dvc"]
    subprocess.run([*dvc, "init", "--no-scm", "--quiet"], cwd=folder, check=True, env=environment)
    seed = random.SystemRandom().randrange(1 << 30)
    print(f"moments drawn with seed {seed}")
    moments, kills, longest = random.Random(seed), 0, 40.0
    while True:
        process = subprocess.Popen(
            [*dvc, "repro"], cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            told, _ = process.communicate(timeout=moments.uniform(1, longest) if kills < 20 else None)
        except subprocess.TimeoutExpired:
            for victim in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
                victim.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, told
        break
    assert kills == 20
    expected, found = outcome(done), outcome(folder)
    assert found.keys() == expected.keys()
    assert len(found) > 40
    assert not [name for name in expected if found[name] != expected[name]]
    assert not list(folder.rglob(".*.part")), "half-written files are left"
    again = subprocess.run([*dvc, "repro"], cwd=folder, env=environment, capture_output=True, text=True)
    assert "up to date" in again.stdout
