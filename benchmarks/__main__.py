"""python -m benchmarks: measure, print, write results/benchmarks/ and the table of docs/speed.md. Images are random."""

import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import torch

from benchmarks.apart import side_by_side
from benchmarks.networks import flops, write_table
from benchmarks.procedures import EXAMPLE, FRACTION, dense_network, evaluation, pruning, structure, training
from experiments import KEEP_MEMORY
from legr.files import write_json, write_text
from legr.training import Compute

RESULTS, PAGE = Path("results/benchmarks"), Path("docs/speed.md")
COLUMNS = ["what", "precision", "threads", "baseline", "baseline_s", "ours_s", "times_faster"]
VALIDATION, RECALIBRATION, TRAINING = 800, 600, 384  # images; the first two in the laptop scale's proportion


def compare(what: str, baseline: str, theirs: tuple, ours: dict[str, tuple], threads: tuple = (1,)) -> Iterator[tuple]:
    """A row of `COLUMNS` by number of threads and precision ("": any); `theirs` and `ours` go to `side_by_side`."""
    for count, s in side_by_side({"theirs": theirs} | ours, threads).items():
        for precision in ours:
            row = what, precision, count, baseline, s["theirs"], s[precision], s["theirs"] / s[precision]
            print(*row, sep=" | ", flush=True)
            yield row


def measure(compute: Compute) -> Iterator[tuple]:
    for what, build in (("choosing the filters", False), ("choosing the filters, building the network", True)):
        yield from compare(what, "filters one by one", (structure, build, True), {"": (structure, build, False)})
    dense = flops(dense_network()[0], EXAMPLE)
    theirs, ours = [f"reaches {flops(pruning(plain)(), EXAMPLE) / dense:.1%}" for plain in (True, False)]
    baseline = f"Torch-Pruning {version('torch-pruning')} ({theirs})"
    yield from compare(f"pruning to 47% of the FLOPs ({ours})", baseline, (pruning, True), {"": (pruning, False)})
    judging, epoch = f"a candidate's evaluation, {VALIDATION:,} images", f"a training epoch, {TRAINING:,} images"
    for what, procedure, *arguments in (
        (f"{judging}, as pruned", evaluation, VALIDATION, 0),
        (f"{judging}, recalibrated on {RECALIBRATION:,}", evaluation, VALIDATION, RECALIBRATION),
        (f"{epoch}, dense", training, TRAINING, 1.0),
        (f"{epoch}, pruned", training, TRAINING, FRACTION),
    ):
        computes = [compute.model_copy(update={"precision": p}) for p in dict.fromkeys([compute.precision, "float32"])]
        calls = {each.precision: (procedure, *arguments, each, False) for each in computes}
        threads = tuple(dict.fromkeys([1, torch.get_num_threads()]))
        yield from compare(what, "plain PyTorch, float32, NCHW", (procedure, *arguments, compute, True), calls, threads)


def table(speed: pd.DataFrame) -> Iterator[list[str]]:
    """Cells of docs/speed.md from speed.csv; of training also images per second."""
    for *first, theirs, ours, faster in speed.fillna({"precision": ""}).itertuples(index=False):
        rate = " ({:.0f} images/s)" if "training" in first[0] else ""
        times = [f"{seconds:.3g}{rate.format(TRAINING / seconds)}" for seconds in (theirs, ours)]
        yield [*map(str, first), *times, f"{faster:.3g}"]


def main() -> None:
    os.environ.update(KEEP_MEMORY)  # for the processes that are timed; the pipeline's own have it too
    compute = Compute().resolve()
    speed = pd.DataFrame(measure(compute), columns=COLUMNS)
    write_text(RESULTS / "speed.csv", speed.to_csv(index=False, float_format="%.5g"))
    about = compute.model_dump() | {
        "device": torch.cuda.get_device_name() if compute.device.startswith("cuda") else "cpu",
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores",
        "versions": {name: version(name).split("+")[0] for name in ("torch", "numpy", "torch-pruning")},
    }
    write_json(RESULTS / "about.json", about)
    write_table(PAGE, table(pd.read_csv(RESULTS / "speed.csv")))


if __name__ == "__main__":
    main()
