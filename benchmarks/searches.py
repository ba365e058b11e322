"""python -m benchmarks.searches: whole searches on CIFAR-10, three seeds, each procedure timed in the same run.

The yardstick judges the plain search's own candidates one after the other by the authors' procedure (float32, NCHW,
batches of 128, the network read and cut anew, all images). Writes results/benchmarks/searches.csv and its figure.
"""

import argparse
import math
import operator
import time
from pathlib import Path

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
from legr.fitness import FitnessSettings
from legr.search import SearchSettings, learn_ranking
from legr.training import Compute

RESULTS = Path("results/benchmarks")
FRACTION = 0.47
RACING = 0.05


def run(images: Dataset, settings: SearchSettings, compute: Compute) -> pd.DataFrame:
    """Columns procedure, seed, evaluation, seconds (since its search began), loss, best, images, same_candidate."""
    space = workspace("laptop", "cifar10-resnet56")
    model = models.load_weights(models.resnet56(), space.baseline)
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
    raced = settings.model_copy(update={"racing": RACING})
    plain, racing = (
        learn_ranking(model, graph, images, FRACTION, own, FitnessSettings(), compute) for own in (settings, raced)
    )
    tables = [yardstick(space.baseline, graph, plain.candidates, images).assign(procedure="yardstick")]
    for name, result in (("plain", plain), ("racing", racing)):
        table = result.history.assign(procedure=name, seconds=result.history.seconds.cumsum())
        tables.append(table.assign(same_candidate=[*map(operator.eq, result.candidates, plain.candidates)]))
    columns = ["procedure", "seed", "evaluation", "seconds", "loss", "best", "images", "same_candidate"]
    return pd.concat(tables, ignore_index=True).assign(seed=settings.seed)[columns]


def yardstick(weights: Path, graph: legr.Graph, candidates: list[legr.Ranking], images: Dataset) -> pd.DataFrame:
    rows, best, start = [], math.inf, time.perf_counter()
    for number, candidate in enumerate(candidates, 1):
        loss = plain_evaluation(weights, graph, candidate, FRACTION, images.holdout)
        best = min(best, loss)
        rows.append({"evaluation": number, "seconds": time.perf_counter() - start, "loss": loss, "best": best})
    return pd.DataFrame(rows).assign(images=len(images.holdout), same_candidate=True)


def summary(curves: pd.DataFrame) -> pd.DataFrame:
    """For each seed and procedure: time of the whole search, and until it reached the plain search's best loss."""
    rows = []
    for seed, part in curves.groupby("seed"):
        target = part[part.procedure == "plain"].best.min() * 1.001  # rounding differs between the procedures
        whole = part[part.procedure == "yardstick"].seconds.max()
        for procedure, own in part.groupby("procedure", sort=False):
            reached = own[own.best <= target].seconds
            rows.append(
                {
                    "seed": seed,
                    "procedure": procedure,
                    "seconds": own.seconds.max(),
                    "times_faster": whole / own.seconds.max(),
                    "best": own.best.min(),
                    "reached_after": reached.min() if len(reached) else math.nan,
                    "share_of_yardstick": reached.min() / whole if len(reached) else math.nan,
                    "images_seen": own.images.sum() / (len(own) * own.images.max()),
                    "same_candidates": own.same_candidate.mean(),
                }
            )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.searches", description=__doc__)
    parser.add_argument("--evaluations", type=int, default=100)
    parser.add_argument("--images", type=int, default=1000, help="held-out images that judge a candidate")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    compute = Compute().resolve()
    try:
        images = data.load(workspace("laptop", "cifar10-resnet56").images)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    images = Dataset(
        images.name, images.classes, images.fit, images.holdout.first(arguments.images), images.test, images.fingerprint
    )
    population = max(arguments.evaluations // 6, 2)
    curves = []
    for seed in range(arguments.seeds):
        settings = SearchSettings(
            population=population, evaluations=arguments.evaluations, sample=max(population // 4, 1), seed=seed
        )
        curves.append(run(images, settings, compute))
        print(summary(pd.concat(curves)).round(3).to_string(index=False), flush=True)
    table = pd.concat(curves, ignore_index=True)
    caption = (
        f"CIFAR-10, ResNet-56 at {FRACTION:.0%} FLOPs, loss as cut on {len(images.holdout):,} held-out images · "
        f"{arguments.evaluations} evaluations, seeds 0 to {arguments.seeds - 1} · {compute.device}, "
        f"{compute.threads} threads, {torch.backends.cpu.get_cpu_capability()}, {compute.precision}; yardstick float32"
    )
    write_text(RESULTS / "searches.csv", summary(table).to_csv(index=False, float_format="%.5g"))
    write_json(RESULTS / "searches.json", {"caption": caption, "torch": torch.__version__.split("+")[0]})
    figures.save(figures.search_times(table, caption), RESULTS / "searches-curves")


if __name__ == "__main__":
    main()
