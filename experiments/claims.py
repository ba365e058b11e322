"""The paper's claims beside what came out: verdicts by fixed rules, from the stages' tables.

A verdict is "reproduced", "partly", "not" or "untested". A lead counts where the 95% interval of a difference leaves
out zero. Rules look at the paper's method (`legr`) unless the row names another.
"""

import itertools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pandas as pd

from experiments.config import Experiment
from experiments.figures import interval
from experiments.methods import METHODS
from experiments.tables import all_networks

Answer = tuple[str, str]  # a verdict, and the numbers behind it


def claims(experiments: Iterable[Experiment]) -> pd.DataFrame:
    """Columns claim, paper, stage, experiment, verdict, evidence; a row for each claim and experiment."""
    rows = []
    for exp in experiments:
        for claim in CLAIMS:
            tested = claim.needs | {"legr"} <= set(exp.methods)
            verdict, evidence = claim.answer(exp) if tested else ("untested", "")
            if exp.settings.data.name == "digits":
                verdict = "untested"
            rows.append([claim.says, claim.paper, claim.stage, exp.name, verdict, evidence])
    return pd.DataFrame(rows, columns=["claim", "paper", "stage", "experiment", "verdict", "evidence"])


def linked(table: pd.DataFrame, titles: dict[str, str], folder: str) -> pd.DataFrame:
    """A column for each experiment, in Markdown: verdicts lead to the executed notebooks below `folder`."""
    links = [f"**[{row.verdict}]({folder}/{row.experiment}/{row.stage}/notebook.ipynb)**" for row in table.itertuples()]
    cells = table.assign(cell=links + (" " + table.evidence))
    wide = cells.pivot(index=["claim", "paper"], columns="experiment", values="cell")
    order = list(dict.fromkeys(zip(table.claim, table.paper, strict=True)))
    return wide.loc[order, list(titles)].rename(columns=titles)


def finding(exp: Experiment, method: str = "legr") -> str:
    """One sentence: at which FLOP counts a method leads the plain ones."""
    if exp.settings.trials == 1:
        return f"{METHODS[method].label}: one trial, no verdict"
    parts = []
    for plain in (m for m in exp.methods if not METHODS[m].learned):
        found = differences(all_networks(exp), method, plain)
        words = {1: "ahead of", 0: "level with", -1: "behind"}
        places = {sign: [f"{t:.0%}" for t, own in zip(found.index, _signs(found), strict=True) if own == sign]
                  for sign in words}  # fmt: skip
        said = [f"{words[sign]} {METHODS[plain].label} at {_listed(places[sign])}" for sign in words if places[sign]]
        parts.append(", ".join(said))
    return f"{METHODS[method].label} is {'; '.join(parts)} of the FLOPs"


def differences(table: pd.DataFrame, method: str, other: str) -> pd.DataFrame:
    """Accuracy of `method` less that of `other` by trial, in points: columns mean and half (of the 95% interval).

    The index is the target, from the highest down.
    """
    wide = table.pivot(index=["target", "trial"], columns="method", values="accuracy")
    return _over_targets(100 * (wide[method] - wide[other]))


def _over_targets(values: pd.Series) -> pd.DataFrame:
    groups = values.groupby("target")
    return pd.DataFrame({"mean": groups.mean(), "half": groups.agg(interval)}).sort_index(ascending=False)


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _signs(found: pd.DataFrame) -> list[int]:
    """1: a lead, -1: behind, 0: zero is in the interval, or there is none."""
    return [int(row.mean - row.half > 0) - int(row.mean + row.half < 0) for row in found.itertuples()]


def _points(found: pd.DataFrame, name: str = "{:.0%}") -> str:
    halves = [f" ± {half:.2f}" if half == half else "" for half in found.half]
    pairs = zip(found.index, found["mean"], halves, strict=True)
    return ", ".join(f"{name.format(place)} {mean:+.2f}{half}" for place, mean, half in pairs).replace("-", "−")


def _all_or_some(good: list[bool]) -> str:
    return "reproduced" if all(good) else "partly" if any(good) else "not"


def latency_falls(exp: Experiment) -> Answer:
    """Reproduced where medians at every batch size are in the order of the FLOPs, nearly (Spearman's ρ ≥ 0.9)."""
    times, target, orders, said = pd.read_csv(exp.path("compare/latency.csv")), min(exp.settings.targets), [], []
    for batch, part in times.groupby("batch"):
        orders.append(part[["flops", "latency_ms"]].corr("spearman").iloc[0, 1] >= 0.9)
        dense = part.latency_ms[part.method == "dense"].iloc[0]
        own = part.latency_ms[(part.method == "legr") & (part.target == target)].iloc[0]
        said.append(f"{own / dense:.2f} at batch {batch}")
    return _all_or_some(orders), f"time at {target:.0%} FLOPs over the dense network's: {', '.join(said)}"


def leads(method: str, other: str) -> Callable[[Experiment], Answer]:
    """Reproduced where `method` leads at every target; partly where at some, and is nowhere behind."""

    def answer(exp: Experiment) -> Answer:
        found = differences(all_networks(exp), method, other)
        signs = _signs(found)
        verdict = "reproduced" if min(signs) > 0 else "partly" if max(signs) > 0 > -1 <= min(signs) else "not"
        if found.half.isna().any():
            verdict = "untested"
        return verdict, f"points: {_points(found)}"

    return answer


def one_ranking_serves(exp: Experiment) -> Answer:
    """Reproduced where every network of the ranking is a subset of the next larger."""
    shares = pd.read_csv(exp.path("sets/legr/cuts.csv")).share
    masks = [exp.select("legr", share) for share in shares]
    pairs = itertools.pairwise(masks)
    subset = [all((b <= a).all() for a, b in zip(large, small, strict=True)) for large, small in pairs]
    return _all_or_some(subset), f"{sum(subset)} of {len(subset)} cuts lie in the next larger one"


def _answers(exp: Experiment, question: str) -> pd.DataFrame | None:
    """Accuracy in percent after the ablations' steps: a row for each target and seed, a column for each answer."""
    table = pd.read_csv(exp.path("ablations/searches.csv"), dtype={"answer": str})
    part = 100 * table[table.question == question].pivot(index=["target", "seed"], columns="answer", values="accuracy")
    return None if part.empty else part


def lowest_is_enough(exp: Experiment) -> Answer:
    """Reproduced where the ranking learned at the lowest count is nowhere behind one learned where it is used."""
    wide = _answers(exp, "flops")
    if wide is None:
        return "untested", ""
    counts = sorted((float(name.strip("%")) / 100, name) for name in wide)
    lowest = counts[0][1]
    used = [(target, name) for target, name in counts[1:] if target in wide.index]
    parts = [wide.loc[[target], lowest] - wide.loc[[target], name] for target, name in used]
    if not parts:
        return "untested", ""
    found = _over_targets(pd.concat(parts))
    evidence = f"learned at {lowest} against where it is used, points: {_points(found)}"
    return _all_or_some([sign >= 0 for sign in _signs(found)]), evidence


def few_steps_are_enough(exp: Experiment) -> Answer:
    """Reproduced where 50 steps (or the next fewer) are nowhere behind the most."""
    wide = _answers(exp, "fitness.steps")
    if wide is None or wide.shape[1] < 3:
        return "untested", ""
    steps = sorted(int(name) for name in wide)
    few = max((s for s in steps if 0 < s <= 50), default=steps[1])
    found = _over_targets(wide[str(few)] - wide[str(steps[-1])])
    evidence = f"{few} against {steps[-1]} steps, points: {_points(found)}"
    return _all_or_some([sign >= 0 for sign in _signs(found)]), evidence


def accuracy_is_kept(exp: Experiment) -> Answer:
    """Reproduced where at every FLOP count of the paper its change lies in our interval or below it."""
    known = {"cifar10": {0.7: 0.2, 0.47: -0.2}, "imagenet": {0.7: -0.4, 0.6: -1.05, 0.5: -2.4}}
    table = all_networks(exp)
    own = table[table.method == "legr"].set_index(["target", "trial"]).accuracy
    found = _over_targets(100 * (own - exp.dense["accuracy"]))
    papers = known.get(exp.settings.data.name, {})
    good = [row.mean + row.half >= papers[row.Index] for row in found.itertuples() if row.Index in papers]
    epochs = exp.settings.finetune.recipe.epochs
    tested = good and found.half.notna().all()
    return _all_or_some(good) if tested else "untested", f"points, after {epochs} epochs: {_points(found)}"


def a_set_is_cheap(exp: Experiment) -> Answer:
    """Reproduced where seven networks by one search take at most half of what they take by a search each."""
    cost = pd.read_csv(exp.path("compare/cost.csv"))
    seven = cost[(cost.method == "legr") & (cost.networks == 7)].iloc[0]
    verdict = "reproduced" if seven.ratio >= 2 else "partly" if seven.ratio > 1.1 else "not"
    hours = f"{seven['one search']:.1f} h with one search, {seven['a search each']:.1f} h with a search each"
    return verdict, f"{seven.ratio:.2f} times for seven: {hours}"


class Claim(NamedTuple):
    """A claim, the paper's number, the stage that has the evidence, the methods that it takes, and the rule."""

    says: str
    paper: str
    stage: str
    needs: set[str]
    answer: Callable[[Experiment], Answer]


OURS = "Ours: another fitness beats norms alone"
KEPT = "ResNet-56: 70% +0.2, 47% −0.2; MobileNetV2: 70% −0.4, 60% −1.05, 50% −2.4"
LOWEST, HARDLY = "Judging at the lowest FLOP count is enough", "claimed; 20 to 80% hardly matters (not checked)"
CLAIMS = (
    Claim("LeGR beats uniform pruning at equal FLOPs", "claimed", "compare", {"uniform"}, leads("legr", "uniform")),
    Claim("LeGR beats pruning by norms alone", "implied", "compare", {"norm"}, leads("legr", "norm")),
    Claim(OURS, "–", "compare", {"legr-ours", "norm"}, leads("legr-ours", "norm")),
    Claim("Accuracy is kept", KEPT, "compare", set(), accuracy_is_kept),
    Claim("One ranking serves every FLOP count", "claimed", "sets/legr", set(), one_ranking_serves),
    Claim(LOWEST, HARDLY, "ablations", set(), lowest_is_enough),
    Claim("A few steps τ̂ are enough for the fitness", "claimed", "ablations", set(), few_steps_are_enough),
    Claim("A set of networks is cheaper", "2 to 3 times for seven", "compare", set(), a_set_is_cheap),
    Claim("Latency falls as FLOPs fall", "claimed (Fig. 8)", "compare", set(), latency_falls),
)
