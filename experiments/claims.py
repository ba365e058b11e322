"""The paper's claims beside what came out: verdicts by fixed rules, from the stages' tables.

A claim is looked at in several places: FLOP counts, or batch sizes. In each it holds, or fails, or the 95% interval
leaves it open. `_verdict` puts the places together. Accuracies are the paper's method's (`legr`) unless the row names
another; the ablations' searches have the fitness that params.yaml gives them.
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
MARGIN = 0.5  # points of accuracy: a smaller loss counts as none
CHEAPER, SLIGHTLY = 2, 1.1  # times: what counts for the cost of a set as reproduced, and as partly


def claims(experiments: Iterable[Experiment]) -> pd.DataFrame:
    """Columns claim, paper, stage, experiment, verdict, evidence; a row for each claim and experiment."""
    rows = []
    for exp in experiments:
        for claim in CLAIMS:
            verdict, evidence = claim.answer(exp) if claim.needs <= set(exp.methods) else ("untested", "")
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
    if exp.settings.data.name == "digits" or exp.settings.trials == 1:
        few = "digits" if exp.settings.data.name == "digits" else "one trial"
        return f"{METHODS[method].label}: {few}, no verdict"
    parts = []
    for plain in (m for m in exp.methods if not METHODS[m].learned):
        found = differences(all_networks(exp), method, plain)
        words = {1: "ahead of", 0: "not distinguishable from", -1: "behind"}
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


def _signs(found: pd.DataFrame, over: float = 0) -> list[int]:
    """1: the interval lies above `over`, -1: below it, 0: around it, or there is none."""
    return [int(row.mean - row.half > over) - int(row.mean + row.half < over) for row in found.itertuples()]


def _verdict(signs: list[int]) -> str:
    """Of a claim that holds (1), fails (-1) or is open (0) in several places.

    reproduced: it holds in all. partly: in some, and it fails in none. mixed: it holds in some and fails in some.
    fails in part: it fails in some and holds in none. not: it fails in all. open: the intervals decide in none.
    """
    if min(signs) > 0:
        return "reproduced"
    if max(signs) > 0:
        return "mixed" if min(signs) < 0 else "partly"
    if max(signs) < 0:
        return "not"
    return "fails in part" if min(signs) < 0 else "open"


def _points(found: pd.DataFrame, name: str = "{:.0%}") -> str:
    halves = [f" ± {half:.2f}" if half == half else "" for half in found.half]
    pairs = zip(found.index, found["mean"], halves, strict=True)
    return ", ".join(f"{name.format(place)} {mean:+.2f}{half}" for place, mean, half in pairs).replace("-", "−")


def leads(method: str, other: str) -> Callable[[Experiment], Answer]:
    """Holds where `method` is ahead of `other` in accuracy."""

    def answer(exp: Experiment) -> Answer:
        found = differences(all_networks(exp), method, other)
        tested = found.half.notna().all()
        return _verdict(_signs(found)) if tested else "untested", f"points: {_points(found)}"

    return answer


def accuracy_is_kept(exp: Experiment) -> Answer:
    """Holds where the change from the dense network is at most MARGIN worse than the paper's."""
    known = {"cifar10": {0.7: 0.2, 0.47: -0.2}, "imagenet": {0.7: -0.4, 0.6: -1.05, 0.5: -2.4}}
    table = all_networks(exp)
    own = table[table.method == "legr"].set_index(["target", "trial"]).accuracy
    found = _over_targets(100 * (own - exp.dense["accuracy"]))
    papers = pd.Series(known.get(exp.settings.data.name, {}), dtype=float).reindex(found.index)
    signs = _signs(found.assign(mean=found["mean"] - papers)[papers.notna()], -MARGIN)
    verdict = _verdict(signs) if signs and found.half.notna().all() else "untested"
    judged, others = found[papers.notna()], found[papers.isna()]
    said = [_points(judged)] * bool(signs) + [f"not judged: {_points(others)}"] * bool(len(others))
    why = "; the paper's are of other images" * (not signs)
    return verdict, f"points, after {exp.settings.finetune.recipe.epochs} epochs: {'; '.join(said)}{why}"


def one_ranking_serves(exp: Experiment) -> Answer:
    """Holds where a network of the ranking is a subset of the next larger, which is so by construction."""
    shares = pd.read_csv(exp.path("sets/legr/cuts.csv")).share
    masks = [exp.select("legr", share) for share in shares]
    pairs = itertools.pairwise(masks)
    subset = [all((b <= a).all() for a, b in zip(large, small, strict=True)) for large, small in pairs]
    verdict = _verdict([1 if part else -1 for part in subset])
    return verdict, f"by construction; {sum(subset)} of {len(subset)} cuts lie in the next larger one"


def lowest_is_enough(exp: Experiment) -> Answer:
    """The ranking learned at the lowest count, less one learned where it is used."""
    wide = _answers(exp, "targets")
    counts = sorted((float(name.strip("%")) / 100, name) for name in wide if "," not in name)
    lowest = counts[0][1] if counts else ""
    used = [(target, name) for target, name in counts[1:] if target in wide.index]
    if not used:
        return "untested", ""
    parts = [wide.loc[[target], lowest] - wide.loc[[target], name] for target, name in used]
    steps = f", fitness after {exp.settings.ablations.search.fitness.steps} steps"
    return _one_search_each(exp, pd.concat(parts), f"learned at {lowest}, minus learned at the target itself", steps)


def few_steps_are_enough(exp: Experiment) -> Answer:
    """A search by 50 steps (or the next fewer), less one by the most."""
    wide = _answers(exp, "fitness.steps")
    *fewer, most = sorted(map(int, wide)) or [0]
    if len(fewer) < 2:
        return "untested", ""
    few = max((steps for steps in fewer if 0 < steps <= 50), default=fewer[1])
    judged = f", judged at {_listed([f'{target:.0%}' for target in exp.settings.ablations.search.targets])}"
    return _one_search_each(exp, wide[str(few)] - wide[str(most)], f"{few} steps minus {most}", judged)


def _answers(exp: Experiment, question: str) -> pd.DataFrame:
    """Accuracy in percent after the ablations' steps: a row for each target and seed, a column for each answer."""
    table = pd.read_csv(exp.path("ablations/searches.csv"), dtype={"answer": str})
    part = table[table.question == question]
    return 100 * part.pivot(index=["target", "seed"], columns="answer", values="accuracy")


def _one_search_each(exp: Experiment, values: pd.Series, compared: str, judged: str) -> Answer:
    """Never decided: the intervals are over seeds of training, and how much searches vary is not in them."""
    found, search = _over_targets(values), exp.settings.ablations.search
    recalibrated = ", BatchNorm recalibrated" * bool(search.fitness.recalibration_images)
    about = f"one search each, {search.search.evaluations} evaluations{judged}{recalibrated}"
    verdict = "open" if found.half.notna().all() else "untested"
    return verdict, f"{compared} ({about}), points: {_points(found)}"


def a_set_is_cheap(exp: Experiment) -> Answer:
    """Holds where seven networks take `CHEAPER` times the time by a search each, in every trial."""
    cost = pd.read_csv(exp.path("compare/cost.csv"))
    seven = cost[(cost.method == "legr") & (cost.networks == 7)].iloc[0]
    if pd.isna(seven.ratio):
        return "untested", "no network was trained on the machine that searched"
    verdict = "reproduced" if seven.lowest >= CHEAPER else "partly" if seven.lowest > SLIGHTLY else "not"
    ratio = f"{seven.ratio:.2f} times for seven ({seven.lowest:.2f} to {seven.highest:.2f} by trial's search)"
    hours = f"{seven['one search']:.1f} h with one search, {seven['a search each']:.1f} h with a search each"
    return verdict, f"{ratio}, from measured times: {hours}"


def latency_falls(exp: Experiment) -> Answer:
    """Holds at a batch size where medians are in the order of the FLOPs, nearly (Spearman's ρ ≥ 0.9)."""
    times, signs, said = pd.read_csv(exp.path("compare/latency.csv")), [], []
    for batch, part in times[times.method.isin(["legr", "dense"])].groupby("batch"):
        ordered = part[["flops", "latency_ms"]].corr("spearman").iloc[0, 1] >= 0.9
        signs.append(1 if ordered else -1)
        own = part[part.method == "legr"].sort_values("target", ascending=False)
        ratios = own.latency_ms / part.latency_ms[part.method == "dense"].iloc[0]
        pairs = zip(own.target, ratios, strict=True)
        said.append(f"batch {batch}: {', '.join(f'{target:.0%} {ratio:.2f}' for target, ratio in pairs)}")
    return _verdict(signs), f"median time over the dense network's, first trial, {'; '.join(said)}"


class Claim(NamedTuple):
    """A claim, the paper's number, the stage that has the evidence, the methods that it takes, and the rule."""

    says: str
    paper: str
    stage: str
    needs: set[str]
    answer: Callable[[Experiment], Answer]


KEPT = "ResNet-56: 70% +0.2, 47% −0.2; MobileNetV2: 70% −0.4, 60% −1.05, 50% −2.4"
LOWEST, HARDLY = "Judging at the lowest FLOP count is enough", "claimed; 20 to 80% hardly matters (not checked)"
CHEAP, TIMES = "One search for a set costs less than a search per network", "2 to 3 times for seven, against prior work"
CLAIMS = (
    Claim("LeGR beats uniform pruning", "claimed", "compare", {"legr", "uniform"}, leads("legr", "uniform")),
    Claim("LeGR beats pruning by norms alone", "implied", "compare", {"legr", "norm"}, leads("legr", "norm")),
    Claim("Ours: another fitness beats norms alone", "–", "compare", {"legr-ours", "norm"}, leads("legr-ours", "norm")),
    Claim("Accuracy falls no further than in the paper", KEPT, "compare", {"legr"}, accuracy_is_kept),
    Claim("One ranking serves every FLOP count", "claimed", "sets/legr", {"legr"}, one_ranking_serves),
    Claim(LOWEST, HARDLY, "ablations", set(), lowest_is_enough),
    Claim("A few steps τ̂ are enough for the fitness", "claimed", "ablations", set(), few_steps_are_enough),
    Claim(CHEAP, TIMES, "compare", {"legr"}, a_set_is_cheap),
    Claim("Latency falls as FLOPs fall", "claimed (Fig. 8)", "compare", {"legr"}, latency_falls),
)
