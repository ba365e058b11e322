"""The paper's claims beside what came out: verdicts by the rules of docs/verdicts.md, from the stages' tables."""

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from experiments.analysis import verdicts
from experiments.analysis.tables import paper_changes
from experiments.experiment import Experiment
from experiments.stats import welch

CHEAPER, SLIGHTLY = 2, 1.1  # times: what counts for the cost of a set as reproduced, and as partly


class Answer(NamedTuple):
    """A verdict, the numbers behind it, and the one to show beside the verdict."""

    verdict: str
    evidence: str
    number: str = ""


def claims(experiments: Iterable[Experiment]) -> pd.DataFrame:
    """Columns claim, paper, stage, experiment, verdict, evidence, number; a row an experiment that has the methods."""
    rows = []
    for exp in experiments:
        for claim in CLAIMS:
            if not set(claim.needs) <= set(exp.methods):
                continue
            answer = claim.answer(exp)
            if exp.settings.data.name == "digits":
                answer = Answer("untested", answer.evidence)
            paper = claim.paper if isinstance(claim.paper, str) else claim.paper()
            rows.append([claim.says, paper, claim.stage, exp.name, *answer])
    return pd.DataFrame(rows, columns=["claim", "paper", "stage", "experiment", *Answer._fields])


def leads(method: str, other: str) -> Callable[[Experiment], Answer]:
    """Whether `method` is ahead of `other` at the endpoint; single targets are shown, those that differ with a star."""

    def answer(exp: Experiment) -> Answer:
        lead, stars = verdicts.difference(exp, method, other), verdicts.differing(exp, method, other)
        if lead is verdicts.SAME:
            return Answer(lead.verdict(verdicts.margin(exp)), "the same networks")
        single = [
            f"{target:.0%} {each}{'*' if target in stars else ''}"
            for target, each in verdicts.differences(exp, method, other).items()
        ]
        evidence = f"{lead} points over {verdicts.judged_in_words(exp)}; {', '.join(single)}"
        return Answer(lead.verdict(verdicts.margin(exp)), evidence, str(lead))

    return answer


# Other claims -----------------------------------------------------------------------------


def accuracy_is_kept(exp: Experiment) -> Answer:
    """The change from the dense network beside the paper's; judged where images and schedule are the paper's."""
    changes, table, epochs = paper_changes(exp.settings.model), exp.networks, exp.settings.finetune.recipe.epochs
    change = 100 * (table[table.method == "legr"].set_index("target").accuracy - exp.dense["accuracy"])
    groups = change.groupby("target")
    changes_shown, kept = [], []
    for target in verdicts.judged_targets(exp):
        changes_shown.append(f"{target:.0%} {groups.mean()[target]:+.2f}".replace("-", "−"))
        kept.append(groups.mean()[target] >= changes.get(target, 0) - verdicts.margin(exp))
    evidence = f"LeGR, points after {epochs} epochs: {', '.join(changes_shown)}"
    if exp.scale != "paper":
        return Answer("untested", f"{evidence}; not judged: the paper trained longer")
    return Answer("reproduced" if all(kept) else "partly" if any(kept) else "not", evidence)


def one_ranking_serves(exp: Experiment) -> Answer:
    """Whether each network of the ranking is contained in the next larger one, which is so by construction."""
    masks = [exp.select("legr", share) for share in pd.read_csv(exp.path("sets/legr/cuts.csv")).share]
    pairs = list(itertools.pairwise(masks))
    contained = [all((b <= a).all() for a, b in zip(large, small, strict=True)) for large, small in pairs]
    verdict = "by construction" if all(contained) else "not"
    which = "each" if all(contained) else f"{sum(contained)}"
    return Answer(verdict, f"{which} of {len(pairs)} networks cut from the ranking is contained in the next larger one")


def answers_of_searches(exp: Experiment, searches: pd.DataFrame) -> dict[str, Answer]:
    """Two claims by the ablations' searches: the extremes of their answers compared at the judged targets.

    The ranking learned at the lowest count, less one learned at the highest; and the search by the fewest steps above
    none, less one by the most.
    """
    judged = searches[searches.target.isin(verdicts.judged_targets(exp))]
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
        return Answer("untested", "")
    (low, least), (high, most) = answers[0], answers[-1]
    lead, count = welch(least, most), len(least)
    verdict = lead.verdict(verdicts.margin(exp))
    verdict = {"ahead": "reproduced", "behind": "not"}.get(verdict, verdict)
    searches = f"{count} searches each" if count > 1 else "one search each, which can't decide it"
    what = f"points of accuracy after {exp.settings.ablations.steps} steps, over {verdicts.judged_in_words(exp)}"
    return Answer(verdict, f"{compared.format(low, high)}: {lead} {what} ({searches})")


def by_searches(claim: str) -> Callable[[Experiment], Answer]:
    """One of `answers_of_searches`, from the ablations' results."""

    def answer(exp: Experiment) -> Answer:
        if not exp.settings.ablations.vary:
            return Answer("untested", "")
        searches = pd.read_csv(exp.path("ablations/searches.csv"), dtype={"answer": str})
        return answers_of_searches(exp, searches)[claim]

    return answer


def a_set_is_cheap(exp: Experiment) -> Answer:
    """Whether seven networks take `CHEAPER` times the time by a search each, in every trial."""
    cost = pd.read_csv(exp.path("compare/cost.csv"))
    seven = cost[(cost.method == "legr") & (cost.networks == 7)].iloc[0]
    if pd.isna(seven.ratio):
        return Answer("untested", "no network was trained on the machine that searched")
    verdict = "reproduced" if seven.lowest >= CHEAPER else "partly" if seven.lowest > SLIGHTLY else "not"
    hours = f"{seven['one search']:.1f} h instead of {seven['a search each']:.1f} h"
    evidence = f"{seven.ratio:.1f}× cheaper for seven networks: {hours} (against a search each, measured times)"
    evidence += f"; by trial {seven.lowest:.1f} to {seven.highest:.1f} times"
    return Answer(verdict, evidence, f"{seven.ratio:.1f}× cheaper")


def latency_falls(exp: Experiment) -> Answer:
    """Holds at a batch size if LeGR's median falls at every step from the dense network to the last judged target."""
    times = pd.read_csv(exp.path("compare/latency.csv"))
    wide = times[times.method.isin(["legr", "dense"])].pivot(index="target", columns="batch", values="latency_ms")
    ratios = (wide / wide.loc[1]).loc[verdicts.judged_targets(exp)]
    holds = [pd.concat([pd.Series([1.0]), at_batch]).is_monotonic_decreasing for _, at_batch in ratios.items()]
    shown = [
        f"batch {batch}: {', '.join(f'{target:.0%} {ratio:.2f}' for target, ratio in at_batch.items())}"
        for batch, at_batch in ratios.items()
    ]
    verdict = "reproduced" if all(holds) else "partly" if any(holds) else "not"
    evidence = f"median time over the dense network's, first trial, {'; '.join(shown)}"
    return Answer(verdict, evidence, f"{ratios.iloc[-1, -1]:.2f}× time")


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
    """A claim, the paper's number or word, its rule, the stage with the evidence, and the methods that it takes."""

    says: str
    paper: str | Callable[[], str]
    answer: Callable[[Experiment], Answer]
    stage: str = "compare"
    needs: tuple[str, ...] = ("legr",)


def lead(says: str, paper: str, method: str, other: str) -> Claim:
    return Claim(says, paper, leads(method, other), needs=(method, other))


CLAIMS = (
    lead("LeGR beats uniform pruning", "claimed", "legr", "uniform"),
    lead("LeGR beats pruning by norms alone", "implied", "legr", "norm"),
    lead("Ours: LeGR, ours, beats norms alone", "–", "legr-ours", "norm"),
    lead("Ours: norms with a rule beat norms alone", "–", "norm-kept", "norm"),
    lead("Ours: LeGR, ours, beats the rule", "–", "legr-ours", "norm-kept"),
    Claim("Accuracy falls no further than in the paper", _papers_drops, accuracy_is_kept),
    Claim("One ranking serves every FLOP count", "claimed", one_ranking_serves, stage="sets/legr"),
    Claim(
        "Judging at the lowest FLOP count is enough",
        "claimed; 20 to 80% hardly matters (quoted from memory, not checked)",
        by_searches("lowest"),
        stage="ablations",
        needs=(),
    ),
    Claim("A few steps τ̂ are enough for the fitness", "claimed", by_searches("steps"), stage="ablations", needs=()),
    Claim(
        "One search for a set costs less than a search per network",
        "2 to 3 times for seven, against prior work",
        a_set_is_cheap,
    ),
    Claim("Latency falls as FLOPs fall", "claimed (Fig. 8)", latency_falls),
)
