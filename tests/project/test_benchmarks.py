"""The baselines do the same work as ours, and the page has the numbers that were measured."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch

import legr
from benchmarks import gpu
from benchmarks.__main__ import COLUMNS, PAGE, RESULTS, table
from benchmarks.procedures import FRACTION, plain_loss, random_images
from legr.data import Dataset
from legr.fitness import Fitness, FitnessSettings
from tests.conftest import PROJECT


@pytest.mark.parametrize("recalibration", [0, 300])
def test_the_plain_loss_is_the_loss_of_the_fitness(small, compute, recalibration):
    model, graph = small
    images, ranking = random_images(201 + recalibration, "cpu"), legr.Ranking.norm_only(len(graph.layers))
    data = Dataset("random", list("0123456789"), images, torch.arange(200), images)
    fitness = Fitness(model, graph, data, [FRACTION], FitnessSettings(recalibration_images=recalibration), compute)
    plain = plain_loss(model, graph, ranking, images[:200], fitness.recalibration)
    assert plain == pytest.approx(fitness(fitness.select(ranking))["loss"], rel=1e-4)


@pytest.mark.slow
def test_the_check_of_a_gpu_runs_without_one_and_leaves_nothing():
    """With the CPU in its place, which agrees with itself."""
    path = PROJECT / gpu.PATH
    before = path.read_bytes() if path.exists() else None
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    found = json.loads(run.stdout)
    assert run.returncode == 0 and found["fine"], run.stderr
    assert found["selections"]["identical"] == found["selections"]["of"] == 186
    assert all(found["bits"].values()) and found["search"]["relative"] == 0
    rates = found["images_a_second"]
    assert len(rates) == 6 and all(rate > 0 for rate in rates.values())
    assert (path.read_bytes() if path.exists() else None) == before


def test_the_page_has_the_measured_numbers():
    speed, page = pd.read_csv(PROJECT / RESULTS / "speed.csv"), (PROJECT / PAGE).read_text(encoding="utf-8")
    assert list(speed) == COLUMNS
    assert (speed.times_faster * speed.ours_s / speed.baseline_s).between(0.999, 1.001).all()
    rows = [line[2:-2].split(" | ") for line in page.split("|---|\n")[1].splitlines() if line.startswith("|")]
    assert rows == list(table(speed))
    about = json.loads((PROJECT / RESULTS / "about.json").read_text())
    machine, capability, cores = about["processor"].split(", ")
    assert f"{cores} ({machine}, {capability})" in page and f"PyTorch is {about['versions']['torch']}" in page
