"""python -m benchmarks.searches: whole searches on CIFAR-10, each procedure timed in the same run.

The procedures take turns, candidate by candidate, each in its own process, so that a machine that slows down slows all
of them. The yardstick judges the plain search's own candidates by the authors' procedure (float32, NCHW, batches of
128, the network read and cut anew, all images). They judge on test images, as many as the authors hold out: what is
found here is not used. Writes results/benchmarks/searches.csv and its figure.
"""

import argparse
import math
from pathlib import Path
from typing import Literal

import pandas as pd
import torch

import legr
from benchmarks.apart import Apart
from benchmarks.procedures import COMMITTED, FRACTION, dense_network
from benchmarks.yardstick import plain_evaluation
from experiments import figures
from experiments.config import workspace
from legr import data
from legr.data import Dataset
from legr.errors import UserError
from legr.files import write_json, write_text
from legr.fitness import Fitness, FitnessSettings
from legr.search import Search, SearchResult, SearchSettings
from legr.training import Compute

RESULTS = Path("results/benchmarks")
RACING = 0.05


class Authors:
    """Judges a ranking by the authors' procedure."""

    def __init__(self, images: Path, count: int):
        _, self.graph = dense_network()
        self.images = judging(images, count).holdout

    def __call__(self, ranking: legr.Ranking) -> float:
        return plain_evaluation(COMMITTED / "baseline.safetensors", self.graph, ranking, FRACTION, self.images)


class Ours:
    """A search: `step` gives the candidate that it judged, `result` what it found."""

    def __init__(self, images: Path, count: int, settings: SearchSettings, compute: Compute):
        (model, graph), judges, compute = dense_network(), judging(images, count), compute.resolve()
        fitness = Fitness(model, graph, judges, FRACTION, FitnessSettings(), compute, settings.seed)
        self.search = Search(fitness, settings)

    def __call__(self, what: Literal["step", "result"]) -> legr.Ranking | SearchResult:
        if what == "result":
            return self.search.result()
        self.search.step()
        return self.search.evolution.candidates[-1]


def judging(path: Path, count: int) -> Dataset:
    """Test images as held-out ones: `count` of them in a random order (the stored ones go class by class)."""
    images = data.load(path)
    shuffled = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(0))
    judges = images.test[shuffled[:count]]
    return Dataset(images.name, images.classes, images.fit[:1], judges, judges, images.fingerprint)


def run(images: Path, count: int, settings: SearchSettings, compute: Compute) -> pd.DataFrame:
    """Columns procedure, seed, evaluation, seconds (that its search has taken), loss, best, images, network and
    same_candidate (as in the plain search)."""
    clocks: dict[str, list[float]] = {"yardstick": [], "plain": [], "racing": []}
    losses = []
    raced = settings.model_copy(update={"racing": RACING})
    with (
        Apart(Authors, images, count, keep_memory=False) as authors,
        Apart(Ours, images, count, settings, compute, keep_memory=True) as plain,
        Apart(Ours, images, count, raced, compute, keep_memory=True) as racing,
    ):
        for _ in range(settings.evaluations):
            seconds, candidate = plain("step")
            clocks["plain"].append(seconds)
            seconds, loss = authors(candidate)
            clocks["yardstick"].append(seconds)
            losses.append(loss)
            seconds, _ = racing("step")
            clocks["racing"].append(seconds)
        seconds, result = racing("result")
        clocks["racing"][-1] += seconds
        _, whole = plain("result")
    tables = {
        "yardstick": pd.DataFrame({"loss": losses, "best": pd.Series(losses).cummin()}).assign(
            images=count, network=range(1, len(losses) + 1)
        ),
        "plain": whole.history,
        "racing": result.history,
    }
    same = [a == b for a, b in zip(result.candidates, whole.candidates, strict=True)]
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
    images = workspace("laptop", "cifar10-resnet56").images
    try:
        count = len(judging(images, arguments.images).holdout)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    population = max(arguments.evaluations // 5, 2)
    curves = []
    for seed in range(arguments.seeds):
        settings = SearchSettings(
            population=population, evaluations=arguments.evaluations, sample=max(population // 4, 1), seed=seed
        )
        curves.append(run(images, count, settings, compute))
        table = pd.concat(curves, ignore_index=True)
        print(summary(table).round(3).to_string(index=False), flush=True)
        caption = (
            f"CIFAR-10, ResNet-56 at {FRACTION:.0%} FLOPs, loss as cut on {count:,} test images · "
            f"{arguments.evaluations} evaluations (population {population}, sample {settings.sample}), "
            f"seeds 0 to {seed}, racing {RACING} · {compute.device}, {compute.threads} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}, {compute.precision}; yardstick float32 · "
            "each in its own process · racing's line is an estimate, its end is exact"
        )
        write_text(RESULTS / "searches.csv", summary(table).to_csv(index=False, float_format="%.5g"))
        write_json(RESULTS / "searches.json", {"caption": caption, "torch": torch.__version__.split("+")[0]})
        figures.save(figures.search_times(table, caption), RESULTS / "searches-curves")


if __name__ == "__main__":
    main()
