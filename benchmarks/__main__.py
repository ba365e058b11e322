"""python -m benchmarks: measure, print, and write results/benchmarks/. Images are random; speed does not see them."""

import argparse
import itertools
import math
import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import legr
from benchmarks.apart import Apart
from benchmarks.procedures import (
    COMMITTED,
    FRACTION,
    authors_evaluation,
    authors_training,
    dense_network,
    our_evaluation,
    our_training,
)
from benchmarks.runtimes import OnnxNetwork
from benchmarks.yardstick import plain_select, side_by_side, timed
from experiments.config import workspace
from experiments.explorer import Controls, Instrument
from legr import models
from legr.files import write_json, write_text
from legr.inference import can_be_fast, fast_inference
from legr.latency import measure
from legr.training import Compute

RESULTS = Path("results/benchmarks")


def selection() -> list[dict]:
    rows = []
    for name, classes, side in (("resnet56", 10, 32), ("mobilenet_v2", 1000, 224)):
        model = models.build(name, classes, 0)
        graph = legr.trace(model, torch.zeros(1, 3, side, side))
        scores = legr.Ranking.norm_only(len(graph.layers)).scores(legr.filter_norms(model, graph))
        assert all(map(torch.equal, plain_select(graph, scores, FRACTION), legr.select(graph, scores, FRACTION)))
        kept = legr.select(graph, scores, FRACTION)
        functions = {
            "plain": lambda g=graph, s=scores: plain_select(g, s, FRACTION),
            "legr": lambda g=graph, s=scores: legr.select(g, s, FRACTION),
            "build": lambda m=model, g=graph, k=kept: legr.prune(m, g, k),
        }
        times = side_by_side({name: timed(function) for name, function in functions.items()}, 5)
        rows += [
            row(f"choosing the filters, {name}", "one by one, FLOPs counted anew", times["legr"], times["plain"]),
            row(f"building the network, {name}", "(no yardstick)", times["build"]),
        ]
    return rows


def row(what: str, yardstick: str, ours: float, stock: float = math.nan, kept: float = math.nan, precision="") -> dict:
    """`stock`: the yardstick with the allocator as it comes; `kept`: told to keep its memory, as ours is."""
    times = {"yardstick_s": stock, "yardstick_kept_s": kept, "ours_s": ours, "times_faster": stock / ours}
    return {"what": what, "precision": precision, "yardstick": yardstick, **times, "times_faster_kept": kept / ours}


def precisions(compute: Compute) -> list[str]:
    """Those that `compute` can have; the one that it has is first."""
    return list(dict.fromkeys([compute.precision, "float32"]))


def compared(
    names: Mapping[str, str], yardstick: str, authors: tuple, ours: Mapping[tuple[str, str], tuple], repetitions: int
) -> list[dict]:
    """The authors' procedure twice (see `row`) and `ours` by name and precision, each in its own process."""
    with ExitStack() as stack:
        functions = {
            "stock": stack.enter_context(Apart(*authors, keep_memory=False)),
            "kept": stack.enter_context(Apart(*authors, keep_memory=True)),
            **{key: stack.enter_context(Apart(*make, keep_memory=True)) for key, make in ours.items()},
        }
        times = side_by_side(functions, repetitions)
    return [
        row(names[name], yardstick, times[name, precision], times["stock"], times["kept"], precision)
        for name, precision in ours
    ]


def evaluation(compute: Compute, count: int) -> list[dict]:
    names = {
        "loss": f"one evaluation at 47%, {count:,} images, as cut",
        "recalibrated": "the same, BatchNorm recalibrated first (1,500 images)",
    }
    ours = {
        (kind, precision): (our_evaluation, count, kind, compute.model_copy(update={"precision": precision}))
        for kind, precision in itertools.product(names, precisions(compute))
    }
    yardstick = "float32, NCHW, batch 128, network read and cut anew"
    return compared(names, yardstick, (authors_evaluation, count), ours, 3)


def training(compute: Compute, count: int) -> list[dict]:
    rows = []
    for cut, name in ((False, "dense"), (True, "LeGR at 47%")):
        ours = {
            ("", precision): (our_training, count, cut, compute.model_copy(update={"precision": precision}))
            for precision in precisions(compute)
        }
        names, yardstick = {"": f"training, {count:,} images, {name}"}, "float32, NCHW, no augmentation"
        rows += compared(names, yardstick, (authors_training, count, cut), ours, 2)
    return rows


def latency(compute: Compute, quick: bool) -> pd.DataFrame:
    """Latency relative to the dense network's of networks cut by the committed ranking, by what executes them.

    `PyTorch`: its own modules. `fused`: what evaluates candidates here, BatchNorm folded, activations and sums inside
    oneDNN's convolutions. `ONNX Runtime`: exported, on a CPU in float32. A single image with one thread and with all.
    """
    dense, graph = dense_network()
    norms, ranking = legr.filter_norms(dense, graph), legr.Ranking.load(COMMITTED / "ranking.json")
    kept = {("dense", 1.0, 1): [torch.ones(width, dtype=torch.bool) for width in graph.widths]}
    for fraction, round_to in itertools.product((0.7, FRACTION, 0.3), (1, 8, 16)):
        for method, select, values in (
            ("legr", legr.select, ranking.scores(norms)),
            ("uniform", legr.select_uniform, norms),
        ):
            try:
                kept[method, fraction, round_to] = select(graph, values, fraction, round_to=round_to)
            except legr.UserError:
                continue  # with wide steps a low target is out of reach
    runtimes: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
        "PyTorch": (compute.precision, lambda n: n.to(compute.device, memory_format=torch.channels_last))
    }
    for precision in precisions(compute):
        dtype = compute.model_copy(update={"precision": precision}).dtype
        if can_be_fast(compute.device, dtype):
            runtimes[f"fused, {precision}"] = (precision, lambda n, dtype=dtype: fast_inference(n, dtype))
    if compute.device == "cpu":
        runtimes["ONNX Runtime"] = ("float32", lambda n: OnnxNetwork(n, 32))
    tables = []
    for runtime, (precision, ready) in runtimes.items():
        networks = {key: ready(legr.prune(dense, graph, masks)) for key, masks in kept.items()}
        for threads, batch in dict.fromkeys([(1, 1), (compute.threads, 1), (compute.threads, 128)]):
            here = compute.model_copy(update={"threads": threads, "precision": precision}).resolve()
            for network in networks.values():
                if isinstance(network, OnnxNetwork):
                    network.use(threads)
            table = measure(networks, 32, (batch,), here, 3 if quick else 200 if batch == 1 else 20, 3)
            keys = table.pop("network")
            table["latency_ratio"] = table.latency_ms / table.latency_ms[0]  # the dense network is the first
            table.insert(0, "runtime", runtime)
            table.insert(1, "threads", threads)
            table.insert(2, "method", [key[0] for key in keys])
            table.insert(3, "target", [key[1] for key in keys])
            table.insert(4, "round_to", [key[2] for key in keys])
            table["flops_ratio"] = [graph.flops(kept[key]) / graph.flops() for key in keys]
            tables.append(table)
    compute.resolve()  # the number of threads
    return pd.concat(tables, ignore_index=True)


def slider() -> list[dict]:
    """One move of the explorer's slider on the committed result: cut, count, redraw."""
    controls = Controls(Instrument(workspace("laptop", "cifar10-resnet56")))
    fractions = itertools.cycle((0.7, 0.3, 0.6, 0.4, 0.5))
    times = side_by_side({"move": timed(lambda: setattr(controls.flops, "value", next(fractions)))}, 20)
    return [row("one move of the explorer's slider", "(no yardstick)", times["move"])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the images: to see that it runs")
    quick = parser.parse_args().quick
    compute = Compute().resolve()
    rows = selection() + slider()
    rows += evaluation(compute, 500 if quick else 5000)
    rows += training(compute, 512 if quick else 2560)
    speed, times = pd.DataFrame(rows), latency(compute, quick)
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
