"""python -m benchmarks.searches: whole searches on CIFAR-10, each procedure timed in the same run.

The procedures take turns, candidate by candidate, so that a machine that slows down slows all of them. The yardstick
judges the plain search's own candidates by the authors' procedure (float32, NCHW, batches of 128, the network read and
cut anew, all images). They judge on test images, as many as the authors hold out: what is found here is not used.
Writes results/benchmarks/searches.csv and its figure.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import legr
from benchmarks.yardstick import plain_evaluation
from experiments import figures
from experiments.config import workspace
from legr import data, models
from legr.data import Dataset
from legr.errors import UserError
from legr.files import write_json, write_text
from legr.fitness import Fitness, FitnessSettings
from legr.search import Search, SearchSettings
from legr.training import Compute

RESULTS = Path("results/benchmarks")
FRACTION = 0.47
RACING = 0.05


def run(images: Dataset, settings: SearchSettings, compute: Compute) -> pd.DataFrame:
    """Columns procedure, seed, evaluation, seconds (that its search has taken), loss, best, images, network and
    same_candidate (as in the plain search)."""
    space = workspace("laptop", "cifar10-resnet56")
    model = models.load_weights(models.resnet56(), space.baseline)
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
    plain, racing = (
        Search(Fitness(model, graph, images, FRACTION, FitnessSettings(), compute, settings.seed), own)
        for own in (settings, settings.model_copy(update={"racing": RACING}))
    )
    clocks: dict[str, list[float]] = {"yardstick": [], "plain": [], "racing": []}
    losses = []
    while not plain.evolution.done:
        seconds, _ = timed(plain.step)
        clocks["plain"].append(seconds)
        candidate = plain.evolution.candidates[-1]
        seconds, loss = timed(plain_evaluation, space.baseline, graph, candidate, FRACTION, images.holdout)
        clocks["yardstick"].append(seconds)
        losses.append(loss)
        seconds, _ = timed(racing.step)
        clocks["racing"].append(seconds)
    seconds, raced = timed(racing.result)
    clocks["racing"][-1] += seconds
    whole = plain.result()
    tables = {
        "yardstick": pd.DataFrame({"loss": losses, "best": pd.Series(losses).cummin()}).assign(
            images=len(images.holdout), network=range(1, len(losses) + 1)
        ),
        "plain": whole.history,
        "racing": raced.history,
    }
    same = [a == b for a, b in zip(raced.candidates, whole.candidates, strict=True)]
    columns = ["procedure", "seed", "evaluation", "seconds", "loss", "best", "images", "network", "same_candidate"]
    rows = [
        table.assign(
            procedure=name,
            seed=settings.seed,
            evaluation=range(1, len(table) + 1),
            seconds=pd.Series(clocks[name]).cumsum(),
            same_candidate=same if name == "racing" else True,
        )
        for name, table in tables.items()
    ]
    return pd.concat(rows, ignore_index=True)[columns]


def timed(function: Callable, *arguments: Any) -> tuple[float, Any]:
    """Seconds, and what it returned."""
    start = time.perf_counter()
    found = function(*arguments)
    return time.perf_counter() - start, found


def summary(curves: pd.DataFrame) -> pd.DataFrame:
    """For each seed and procedure: time of the whole search, and until it reached the plain search's best loss."""
    rows = []
    for seed, part in curves.groupby("seed"):
        target = part[part.procedure == "plain"].best.min() * 1.001  # rounding differs between the procedures
        whole = part[part.procedure == "yardstick"].seconds.max()
        for procedure, own in part.groupby("procedure", sort=False):
            known = own.iloc[-1:] if procedure == "racing" else own  # until its end a raced search estimates its best
            reached = known[known.best <= target].seconds
            rows.append(
                {
                    "seed": seed,
                    "procedure": procedure,
                    "seconds": own.seconds.max(),
                    "times_faster": whole / own.seconds.max(),
                    "best": known.best.min(),
                    "reached_after": reached.min() if len(reached) else math.nan,
                    "share_of_yardstick": reached.min() / whole if len(reached) else math.nan,
                    "images_seen": own.drop_duplicates("network").images.sum() / (len(own) * own.images.max()),
                    "same_candidates": own.same_candidate.mean(),
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searches", description=__doc__)
    parser.add_argument("--evaluations", type=int, default=48)
    parser.add_argument("--images", type=int, default=5000, help="test images that judge a candidate")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    compute = Compute().resolve()
    try:
        images = data.load(workspace("laptop", "cifar10-resnet56").images)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    shuffled = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(0))
    judging = images.test[shuffled[: arguments.images]]
    images = Dataset(images.name, images.classes, images.fit, judging, images.test, images.fingerprint)
    population = max(arguments.evaluations // 5, 2)
    curves = []
    for seed in range(arguments.seeds):
        settings = SearchSettings(
            population=population, evaluations=arguments.evaluations, sample=max(population // 4, 1), seed=seed
        )
        curves.append(run(images, settings, compute))
        table = pd.concat(curves, ignore_index=True)
        print(summary(table).round(3).to_string(index=False), flush=True)
        caption = (
            f"CIFAR-10, ResNet-56 at {FRACTION:.0%} FLOPs, loss as cut on {len(judging):,} test images · "
            f"{arguments.evaluations} evaluations (population {population}, sample {settings.sample}), "
            f"seeds 0 to {seed}, racing {RACING} · {compute.device}, {compute.threads} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, {compute.precision}; yardstick float32 · "
            "racing's line is an estimate, its end is exact"
        )
        write_text(RESULTS / "searches.csv", summary(table).to_csv(index=False, float_format="%.5g"))
        write_json(RESULTS / "searches.json", {"caption": caption, "torch": torch.__version__.split("+")[0]})
        figures.save(figures.search_times(table, caption), RESULTS / "searches-curves")


if __name__ == "__main__":
    main()
