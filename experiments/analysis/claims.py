"""The paper's claims beside what came out: verdicts by the rules of docs/verdicts.md, from the stages' tables."""

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pandas as pd

from experiments.analysis.tables import paper_changes
from experiments.experiment import Experiment
from experiments.methods import METHODS
from experiments.records import measurements
from experiments.stats import Difference, holm, interval, welch

Answer = tuple[str, str]  # a verdict, and the numbers behind it
MARGINS = {"resnet56": 0.5, "mobilenet_v2": 1.0}  # points: a smaller difference counts as none
CHEAPER, SLIGHTLY = 2, 1.1  # times: what counts for the cost of a set as reproduced, and as partly
PLAIN = ("norm", "uniform", "norm-kept")  # what methods are compared with
SAME = Difference(0.0, 0.0, 0.0, 1.0)  # of two methods with the same networks


def claims(experiments: Iterable[Experiment]) -> pd.DataFrame:
    """Columns claim, paper, stage, experiment, verdict, evidence; a row for each experiment that has the methods."""
    rows = []
    for exp in experiments:
        for claim in CLAIMS:
            if not set(claim.needs) <= set(exp.methods):
                continue
            verdict, evidence = claim.answer(exp)
            if exp.settings.data.name == "digits":
                verdict = "untested"
            paper = claim.paper if isinstance(claim.paper, str) else claim.paper()
            rows.append([claim.says, paper, claim.stage, exp.name, verdict, evidence])
    return pd.DataFrame(rows, columns=["claim", "paper", "stage", "experiment", "verdict", "evidence"])


def worded(table: pd.DataFrame) -> pd.DataFrame:
    """An experiment's claims for reading: the paper's word, the verdict and the numbers behind it."""
    columns = {"claim": "claim", "paper": "paper", "verdict": "verdict", "evidence": "numbers"}
    return table[list(columns)].rename(columns=columns).set_index("claim")


# Differences ------------------------------------------------------------------------------


def judged_targets(exp: Experiment) -> list[float]:
    """The paper's FLOP counts for this network, from the highest down; where none is a target, all targets."""
    papers = [target for target in paper_changes(exp.settings.model) if target in exp.settings.targets]
    return sorted(papers or exp.settings.targets, reverse=True)


def margin(exp: Experiment) -> float:
    return MARGINS.get(exp.settings.model, 1.0)


def endpoint(exp: Experiment, method: str) -> list[float]:
    """A method's mean accuracy over the judged targets in percent, one of each trial."""
    table = exp.networks
    rows = table[(table.method == method) & table.target.isin(judged_targets(exp))]
    return (100 * rows.groupby("trial").accuracy.mean()).tolist()


def difference(exp: Experiment, method: str, other: str) -> Difference:
    """Of the endpoints, in points; `SAME` where the networks of all trials are the same."""
    networks = exp.networks.set_index(["target", "trial"])
    each, those = (networks.accuracy[networks.method == name] for name in (method, other))
    return SAME if each.equals(those) else welch(endpoint(exp, method), endpoint(exp, other))


def differences(exp: Experiment, method: str, other: str) -> dict[float, Difference]:
    """At single targets, from the highest down, in points."""
    table = exp.networks
    values = {m: 100 * table[table.method == m].set_index("target").accuracy for m in (method, other)}
    targets = sorted(exp.settings.targets, reverse=True)
    return {target: welch(values[method].loc[[target]], values[other].loc[[target]]) for target in targets}


def comparisons(exp: Experiment) -> pd.DataFrame:
    """Every method's endpoint in percent with its 95% interval, and its difference from each of `PLAIN`, in words."""
    rows = []
    for method in exp.methods:
        values = pd.Series(endpoint(exp, method))
        spread = f" ± {interval(values):.2f}" if len(values) > 1 else ""
        row = {"method": METHODS[method].label, "trials": len(values)}
        row[f"mean over {in_words(judged_targets(exp))} (%)"] = f"{values.mean():.2f}{spread}"
        for other in PLAIN:
            if other in exp.methods:
                row[f"minus {METHODS[other].label}"] = "–" if other == method else _judged(exp, method, other)
        rows.append(row)
    return pd.DataFrame(rows).set_index("method")


def _judged(exp: Experiment, method: str, other: str) -> str:
    lead = difference(exp, method, other)
    return "the same networks" if lead is SAME else f"{lead} ({lead.verdict(margin(exp))})"


PHRASES = {
    "ahead": "ahead of",
    "behind": "behind",
    "undecided": "undecided against",
    "untested": "one trial, no verdict against",
}


def _phrase(exp: Experiment, lead: Difference) -> str:
    if lead is SAME:
        return "the same networks as"
    return PHRASES.get(lead.verdict(margin(exp)), f"equal within {margin(exp):g} points to")


def finding(exp: Experiment, method: str) -> str:
    """One sentence: a method's endpoint, and how it stands to those of the plain methods."""
    label = METHODS[method].label
    if exp.settings.data.name == "digits":
        return f"{label}: digits, no verdict"
    leads = {other: difference(exp, method, other) for other in PLAIN if other in exp.methods and other != method}
    phrases = [
        f"{_phrase(exp, lead)} {METHODS[other].label}" + ("" if lead is SAME else f" ({lead})")
        for other, lead in leads.items()
    ]
    mean = f"{statistics.mean(endpoint(exp, method)):.1f}% in the mean over {in_words(judged_targets(exp))}"
    return f"{label}: {mean}; {', '.join(phrases)}"


def opening(experiments: list[Experiment]) -> str:
    """How every method stands to norm-only in each experiment, in words."""
    if experiments[0].settings.data.name == "digits":
        return "digits, no verdict"
    methods = []
    for method in (name for name in experiments[0].methods if name != "norm"):
        leads = [difference(exp, method, "norm") for exp in experiments]
        verdicts = [
            f"{'the same networks' if lead is SAME else lead.verdict(margin(exp))} on {short_title(exp)}"
            for exp, lead in zip(experiments, leads, strict=True)
        ]
        methods.append(f"{METHODS[method].label}: {', '.join(verdicts)}")
    return f"Against {METHODS['norm'].label}: {'; '.join(methods)}."


def endpoints(experiments: list[Experiment]) -> pd.DataFrame:
    """Endpoints of all methods and of the dense network in percent, and their differences from norm-only in points."""
    columns = {}
    for exp in experiments:
        table = comparisons(exp)
        accuracy = table.filter(like="mean over").squeeze("columns")
        dense = pd.Series({"dense": f"{100 * exp.dense['accuracy']:.2f}"})
        columns[f"{exp.title}, {accuracy.name}"] = pd.concat([dense, accuracy])
        minus = f"minus {METHODS['norm'].label}"
        columns[f"{short_title(exp)}, {minus}"] = pd.concat([pd.Series({"dense": "–"}), table[minus]])
    return pd.DataFrame(columns).rename_axis("test accuracy")


def short_title(exp: Experiment) -> str:
    """The network's name."""
    return exp.title.partition(" on ")[0]


def headline(exp: Experiment) -> str:
    """How the last of the learned methods stands to the plain ones, in a few words."""
    *_, method = (name for name in exp.methods if METHODS[name].learned)
    if exp.settings.data.name == "digits":
        return "digits, no verdict"
    phrases: dict[str, list[str]] = {}
    for other in (name for name in PLAIN if name in exp.methods):
        phrases.setdefault(_phrase(exp, difference(exp, method, other)), []).append(METHODS[other].label)
    return f"{METHODS[method].label}: " + "; ".join(f"{phrase} {' and '.join(to)}" for phrase, to in phrases.items())


def in_words(targets: Iterable[float]) -> str:
    """FLOP counts in words: 70, 60 and 50% of the FLOPs."""
    *first, last = [f"{100 * target:g}" for target in targets]
    return f"{', '.join(first)} and {last}% of the FLOPs" if first else f"{last}% of the FLOPs"


def over_norm_only(exp: Experiment) -> pd.DataFrame:
    """Every trial's points over norm-only's mean: columns category (a FLOP count), method, value, star.

    `star`: the method differs from norm-only at this count, by Holm's correction over the judged ones.
    """
    table, rows = exp.networks, []
    norm_only = 100 * table[table.method == "norm"].groupby("target").accuracy.mean()
    for target in sorted(exp.settings.targets, reverse=True):
        for method in (name for name in exp.methods if name != "norm"):
            trials = table[(table.method == method) & (table.target == target)]
            star = target in differing(exp, method, "norm")
            rows += [(f"{target:.0%}", method, 100 * a - norm_only[target], star) for a in trials.accuracy]
    return pd.DataFrame(rows, columns=["category", "method", "value", "star"])


def differing(exp: Experiment, method: str, other: str) -> list[float]:
    """The judged targets at which two methods differ, by Holm's correction."""
    judged, single = judged_targets(exp), differences(exp, method, other)
    return [t for t, differs in zip(judged, holm([single[t].p for t in judged]), strict=True) if differs]


def leads(method: str, other: str) -> Callable[[Experiment], Answer]:
    """Whether `method` is ahead of `other` at the endpoint; single targets are shown, those that differ with a star."""

    def answer(exp: Experiment) -> Answer:
        lead, stars = difference(exp, method, other), differing(exp, method, other)
        if lead is SAME:
            return lead.verdict(margin(exp)), "the same networks"
        single = [
            f"{target:.0%} {each}{'*' if target in stars else ''}"
            for target, each in differences(exp, method, other).items()
        ]
        return lead.verdict(margin(exp)), f"{lead} points over {in_words(judged_targets(exp))}; {', '.join(single)}"

    return answer


# Other claims -----------------------------------------------------------------------------


def accuracy_is_kept(exp: Experiment) -> Answer:
    """The change from the dense network beside the paper's; judged where images and schedule are the paper's."""
    changes, table, epochs = paper_changes(exp.settings.model), exp.networks, exp.settings.finetune.recipe.epochs
    change = 100 * (table[table.method == "legr"].set_index("target").accuracy - exp.dense["accuracy"])
    groups = change.groupby("target")
    changes_shown, kept = [], []
    for target in judged_targets(exp):
        changes_shown.append(f"{target:.0%} {groups.mean()[target]:+.2f}".replace("-", "−"))
        kept.append(groups.mean()[target] >= changes.get(target, 0) - margin(exp))
    evidence = f"points, after {epochs} epochs: {', '.join(changes_shown)}"
    if exp.scale != "paper":
        return "untested", f"{evidence}; not judged: the paper trained longer"
    return ("reproduced" if all(kept) else "partly" if any(kept) else "not"), evidence


def one_ranking_serves(exp: Experiment) -> Answer:
    """Whether each network of the ranking is contained in the next larger one, which is so by construction."""
    masks = [exp.select("legr", share) for share in pd.read_csv(exp.path("sets/legr/cuts.csv")).share]
    pairs = list(itertools.pairwise(masks))
    contained = [all((b <= a).all() for a, b in zip(large, small, strict=True)) for large, small in pairs]
    verdict = "by construction" if all(contained) else "not"
    which = "each" if all(contained) else f"{sum(contained)}"
    return verdict, f"{which} of {len(pairs)} networks cut from the ranking is contained in the next larger one"


def answers_of_searches(exp: Experiment, searches: pd.DataFrame) -> dict[str, Answer]:
    """Two claims by the ablations' searches: the extremes of their answers compared at the judged targets.

    The ranking learned at the lowest count, less one learned at the highest; and the search by the fewest steps above
    none, less one by the most.
    """
    judged = searches[searches.target.isin(judged_targets(exp))]
    counts, steps = (judged[judged.question == question] for question in ("targets", "fitness.steps"))
    single = counts[~counts.answer.str.contains(",")]
    by_count = single.assign(place=single.answer.str.strip("%").astype(float))
    by_steps = steps.assign(place=steps.answer.astype(float))
    return {
        "lowest": _extremes(exp, by_count, "learned at {}, minus learned at {}"),
        "steps": _extremes(exp, by_steps[by_steps.place > 0], "{} steps minus {}"),
    }


def _extremes(exp: Experiment, searches: pd.DataFrame, compared: str) -> Answer:
    """The answer at the lowest `place` less that at the highest: Welch's, over searches."""
    accuracies = 100 * searches.groupby(["place", "answer", "trial"]).accuracy.mean()
    answers = [(name, group) for (_, name), group in accuracies.groupby(level=[0, 1])]
    if len(answers) < 2:
        return "untested", ""
    (low, least), (high, most) = answers[0], answers[-1]
    lead, count = welch(least, most), len(least)
    verdict = lead.verdict(margin(exp))
    verdict = {"ahead": "reproduced", "behind": "not"}.get(verdict, verdict)
    searches = f"{count} searches each" if count > 1 else "one search each, which can't decide it"
    what = f"points of accuracy after {exp.settings.ablations.steps} steps, over {in_words(judged_targets(exp))}"
    return verdict, f"{compared.format(low, high)}: {lead} {what} ({searches})"


def by_searches(claim: str) -> Callable[[Experiment], Answer]:
    """One of `answers_of_searches`, from the ablations' results."""

    def answer(exp: Experiment) -> Answer:
        searches = pd.read_csv(exp.path("ablations/searches.csv"), dtype={"answer": str})
        return answers_of_searches(exp, searches)[claim]

    return answer


def a_set_is_cheap(exp: Experiment) -> Answer:
    """Whether seven networks take `CHEAPER` times the time by a search each, in every trial."""
    cost = pd.read_csv(exp.path("compare/cost.csv"))
    seven = cost[(cost.method == "legr") & (cost.networks == 7)].iloc[0]
    if pd.isna(seven.ratio):
        return "untested", "no network was trained on the machine that searched"
    verdict = "reproduced" if seven.lowest >= CHEAPER else "partly" if seven.lowest > SLIGHTLY else "not"
    hours = f"{seven['one search']:.1f} h instead of {seven['a search each']:.1f} h"
    return verdict, f"{seven.ratio:.1f}× cheaper for seven networks: {hours} (against a search each, measured times)"


def latency_falls(exp: Experiment) -> Answer:
    """At a batch size it holds if the median falls at every step from the dense network to the lowest judged target."""
    ratios = times_over_dense(exp)
    holds = [pd.concat([pd.Series([1.0]), at_batch]).is_monotonic_decreasing for _, at_batch in ratios.items()]
    shown = [
        f"batch {batch}: {', '.join(f'{target:.0%} {ratio:.2f}' for target, ratio in at_batch.items())}"
        for batch, at_batch in ratios.items()
    ]
    verdict = "reproduced" if all(holds) else "partly" if any(holds) else "not"
    return verdict, f"median time over the dense network's, first trial, {'; '.join(shown)}"


def times_over_dense(exp: Experiment) -> pd.DataFrame:
    """LeGR's median times over the dense network's, first trial: judged targets (rows) by batch sizes (columns)."""
    times = pd.read_csv(exp.path("compare/latency.csv"))
    wide = times[times.method.isin(["legr", "dense"])].pivot(index="target", columns="batch", values="latency_ms")
    return (wide / wide.loc[1]).loc[judged_targets(exp)]


def time_won(exp: Experiment) -> str:
    """One sentence: how fast LeGR's network of the lowest judged target is."""
    target = judged_targets(exp)[-1]
    times = [f"{ratio:.2f} (batch {batch})" for batch, ratio in times_over_dense(exp).loc[target].items()]
    record = measurements(exp.path("compare"))[0]
    there = f"on {record['hardware']}, {record['precision']}"
    return f"{short_title(exp)} at {target:.0%} of the FLOPs takes {' and '.join(times)} of the dense time, {there}"


def _papers_drops() -> str:
    """The paper's changes of accuracy, of both networks."""
    names = {"resnet56": "ResNet-56", "mobilenet_v2": "MobileNetV2"}
    networks = []
    for model, name in names.items():
        changes = [f"{target:.0%} {change:+.3g}" for target, change in paper_changes(model).items()]
        networks.append(f"{name}: {', '.join(changes)}".replace("-", "−"))
    return "; ".join(networks).replace("ResNet−56", "ResNet-56")


@dataclass(frozen=True)
class Claim:
    """A claim, the paper's number or word, the stage with the evidence, the methods that it takes, and its rule."""

    says: str
    paper: str | Callable[[], str]
    stage: str
    needs: tuple[str, ...]
    answer: Callable[[Experiment], Answer]


CLAIMS = (
    Claim(
        says="LeGR beats uniform pruning",
        paper="claimed",
        stage="compare",
        needs=("legr", "uniform"),
        answer=leads("legr", "uniform"),
    ),
    Claim(
        says="LeGR beats pruning by norms alone",
        paper="implied",
        stage="compare",
        needs=("legr", "norm"),
        answer=leads("legr", "norm"),
    ),
    Claim(
        says="Ours: LeGR, ours, beats norms alone",
        paper="–",
        stage="compare",
        needs=("legr-ours", "norm"),
        answer=leads("legr-ours", "norm"),
    ),
    Claim(
        says="Ours: norms with a rule beat norms alone",
        paper="–",
        stage="compare",
        needs=("norm-kept", "norm"),
        answer=leads("norm-kept", "norm"),
    ),
    Claim(
        says="Ours: LeGR, ours, beats the rule",
        paper="–",
        stage="compare",
        needs=("legr-ours", "norm-kept"),
        answer=leads("legr-ours", "norm-kept"),
    ),
    Claim(
        says="Accuracy falls no further than in the paper",
        paper=_papers_drops,
        stage="compare",
        needs=("legr",),
        answer=accuracy_is_kept,
    ),
    Claim(
        says="One ranking serves every FLOP count",
        paper="claimed",
        stage="sets/legr",
        needs=("legr",),
        answer=one_ranking_serves,
    ),
    Claim(
        says="Judging at the lowest FLOP count is enough",
        paper="claimed; 20 to 80% hardly matters (quoted from memory, not checked)",
        stage="ablations",
        needs=(),
        answer=by_searches("lowest"),
    ),
    Claim(
        says="A few steps τ̂ are enough for the fitness",
        paper="claimed",
        stage="ablations",
        needs=(),
        answer=by_searches("steps"),
    ),
    Claim(
        says="One search for a set costs less than a search per network",
        paper="2 to 3 times for seven, against prior work",
        stage="compare",
        needs=("legr",),
        answer=a_set_is_cheap,
    ),
    Claim(
        says="Latency falls as FLOPs fall",
        paper="claimed (Fig. 8)",
        stage="compare",
        needs=("legr",),
        answer=latency_falls,
    ),
)
