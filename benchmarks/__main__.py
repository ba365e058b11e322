"""python -m benchmarks: measure, print, and write results/benchmarks/. Images are random; speed does not see them."""

import argparse
import itertools
import math
import platform
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import legr
from benchmarks.runtimes import OnnxNetwork
from benchmarks.yardstick import plain_evaluation, plain_select, plain_training, random_images, side_by_side
from experiments.config import workspace
from experiments.explorer import Controls, Instrument
from legr import models
from legr.data import Dataset
from legr.files import write_json, write_text
from legr.fitness import Fitness, FitnessSettings
from legr.inference import can_be_fast, fast_inference
from legr.latency import measure
from legr.training import Compute, Recipe, train

RESULTS = Path("results/benchmarks")
COMMITTED = Path("results/laptop/cifar10-resnet56")


def selection() -> list[dict]:
    rows = []
    for name, classes, side in (("resnet56", 10, 32), ("mobilenet_v2", 1000, 224)):
        model = models.build(name, classes, 0)
        graph = legr.trace(model, torch.zeros(1, 3, side, side))
        scores = legr.Ranking.norm_only(len(graph.layers)).scores(legr.filter_norms(model, graph))
        assert all(map(torch.equal, plain_select(graph, scores, 0.47), legr.select(graph, scores, 0.47)))
        kept = legr.select(graph, scores, 0.47)
        functions = {
            "plain": lambda g=graph, s=scores: plain_select(g, s, 0.47),
            "legr": lambda g=graph, s=scores: legr.select(g, s, 0.47),
            "build": lambda m=model, g=graph, k=kept: legr.prune(m, g, k),
        }
        times = side_by_side(functions, 5)
        rows += [
            row(f"choosing the filters, {name}", "one by one, FLOPs counted anew", times["plain"], times["legr"]),
            row(f"building the network, {name}", "(no yardstick)", math.nan, times["build"]),
        ]
    return rows


def row(what: str, yardstick: str, slow: float, fast: float) -> dict:
    return {"what": what, "yardstick": yardstick, "yardstick_s": slow, "ours_s": fast, "times_faster": slow / fast}


def evaluation(compute: Compute, count: int) -> list[dict]:
    path = COMMITTED / "baseline.safetensors"
    model = models.load_weights(models.resnet56(), path)
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
    images, ranking = random_images(count), legr.Ranking.norm_only(len(graph.layers))
    data = Dataset("random", list("0123456789"), random_images(2000, seed=1), images, images, "random")
    ours = {
        kind: Fitness(model, graph, data, 0.47, FitnessSettings(kind=kind), compute)
        for kind in ("loss", "recalibrated")
    }
    yardstick = "float32, NCHW, batch 128, network read and cut anew"
    times = side_by_side(
        {
            "plain": lambda: plain_evaluation(path, graph, ranking, 0.47, images),
            **{kind: lambda f=fitness: f(ranking) for kind, fitness in ours.items()},
        },
        3,
    )
    return [
        row(f"one evaluation at 47%, {count:,} images, as cut", yardstick, times["plain"], times["loss"]),
        row("the same, BatchNorm recalibrated first (1,500 images)", yardstick, times["plain"], times["recalibrated"]),
    ]


def training(compute: Compute, count: int) -> list[dict]:
    images, rows = random_images(count), []
    dense = models.load_weights(models.resnet56(), COMMITTED / "baseline.safetensors")
    graph = legr.trace(dense, torch.zeros(1, 3, 32, 32))
    kept = legr.select(
        graph, legr.Ranking.load(COMMITTED / "ranking.json").scores(legr.filter_norms(dense, graph)), 0.47
    )
    recipe = Recipe(epochs=1, lr=1e-4)
    for name in ("dense", "LeGR at 47%"):
        slow, fast = (
            legr.prune(dense, graph, kept)
            if name != "dense"
            else legr.prune(dense, graph, [torch.ones_like(k) for k in kept])
            for _ in range(2)
        )
        functions = {
            "plain": lambda m=slow: plain_training(m, images),
            "legr": lambda m=fast: train(m, images.to(compute.device), recipe, compute, seed=0),
        }
        times = side_by_side(functions, 2)
        rows.append(
            row(f"training, {count:,} images, {name}", "float32, NCHW, no augmentation", times["plain"], times["legr"])
        )
    return rows


def latency(compute: Compute, repetitions: int) -> pd.DataFrame:
    """Latency relative to the dense network's of networks cut by the committed ranking, by what executes them.

    `PyTorch`: its own modules. `fused`: what evaluates candidates here, BatchNorm folded, activations and sums inside
    oneDNN's convolutions. `ONNX Runtime`: exported, on a CPU in float32.
    """
    dense = models.load_weights(models.resnet56(), COMMITTED / "baseline.safetensors").eval()
    graph = legr.trace(dense, torch.zeros(1, 3, 32, 32))
    norms, ranking = legr.filter_norms(dense, graph), legr.Ranking.load(COMMITTED / "ranking.json")
    kept = {("dense", 1.0, 1): [torch.ones(width, dtype=torch.bool) for width in graph.widths]}
    for fraction, round_to in itertools.product((0.7, 0.47, 0.3), (1, 8, 16)):
        for method, select, values in (
            ("legr", legr.select, ranking.scores(norms)),
            ("uniform", legr.select_uniform, norms),
        ):
            try:
                kept[method, fraction, round_to] = select(graph, values, fraction, round_to=round_to)
            except legr.UserError:
                continue  # with wide steps a low target is out of reach
    runtimes: dict[str, Callable[[nn.Module], nn.Module]] = {
        "PyTorch": lambda network: network.to(compute.device, memory_format=torch.channels_last)
    }
    if can_be_fast(compute.device, compute.dtype):
        runtimes["fused"] = lambda network: fast_inference(network, compute.dtype)
    if compute.device == "cpu":
        runtimes["ONNX Runtime"] = lambda network: OnnxNetwork(network, 32, compute.threads)
    tables = []
    for runtime, ready in runtimes.items():
        networks = {key: ready(legr.prune(dense, graph, masks)) for key, masks in kept.items()}
        table = measure(networks, 32, (1, 128), compute, repetitions, 3)
        keys = table.pop("network")
        first = table[[key[0] == "dense" for key in keys]].set_index("batch").latency_ms
        table["latency_ratio"] = [ms / first[b] for ms, b in zip(table.latency_ms, table.batch, strict=True)]
        table.insert(0, "runtime", runtime)
        table.insert(1, "method", [key[0] for key in keys])
        table.insert(2, "target", [key[1] for key in keys])
        table.insert(3, "round_to", [key[2] for key in keys])
        table["flops_ratio"] = [graph.flops(kept[key]) / graph.flops() for key in keys]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def slider() -> list[dict]:
    """One move of the explorer's slider on the committed result: cut, count, redraw."""
    controls = Controls(Instrument(workspace("laptop", "cifar10-resnet56")))
    fractions = itertools.cycle((0.7, 0.3, 0.6, 0.4, 0.5))
    times = side_by_side({"move": lambda: setattr(controls.flops, "value", next(fractions))}, 20)
    return [row("one move of the explorer's slider", "(no yardstick)", math.nan, times["move"])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the images: to see that it runs")
    quick = parser.parse_args().quick
    compute = Compute().resolve()
    rows = selection() + slider()
    rows += evaluation(compute, 500 if quick else 5000)
    rows += training(compute, 512 if quick else 2560)
    speed, times = pd.DataFrame(rows), latency(compute, 3 if quick else 30)
    about = {
        "device": compute.device,
        "precision": compute.precision,
        "threads": compute.threads,
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__.split("+")[0],
        "images": "random",
    }
    with pd.option_context("display.width", 200, "display.max_colwidth", 60):
        print(about, speed.round(4).to_string(index=False), times.round(3).to_string(index=False), sep="\n\n")
    if not quick:
        write_json(RESULTS / "about.json", about)
        write_text(RESULTS / "speed.csv", speed.to_csv(index=False, float_format="%.5g"))
        write_text(RESULTS / "latency.csv", times.to_csv(index=False, float_format="%.5g"))


if __name__ == "__main__":
    main()
