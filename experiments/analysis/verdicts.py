"""How methods stand to each other, by the rules of docs/verdicts.md: endpoints, differences, and these in words."""

import pandas as pd

from experiments.analysis.tables import paper_changes
from experiments.experiment import Experiment
from experiments.methods import METHODS
from experiments.stats import Difference, holm, interval, welch

MARGINS = {"resnet56": 0.5, "mobilenet_v2": 1.0}  # points: a smaller difference counts as none
PLAIN = ("norm", "norm-kept", "uniform")  # what methods are compared with
SAME = Difference(0.0, 0.0, 0.0, 1.0)  # of two methods with the same networks


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
        row[f"mean over {judged_in_words(exp)} (%)"] = f"{values.mean():.2f}{spread}"
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


def opening(experiments: list[Experiment]) -> list[str]:
    """The question, and for each experiment how learned methods and the rule stand to norm-only and to each other."""
    if experiments[0].settings.data.name == "digits":
        return ["digits, no verdict"]
    sentences = ["Is a learned ranking worth its search? In points of test accuracy (the rule needs no search):"]
    for exp in experiments:
        learned = [name for name in exp.methods if METHODS[name].learned]
        pairs = [(method, "norm") for method in (*learned, "norm-kept") if method in exp.methods]
        if "norm-kept" in exp.methods and difference(exp, "norm-kept", "norm") is not SAME:
            pairs.append((learned[-1], "norm-kept"))
        stand = [_stands(exp, *pair) for pair in pairs]
        sentences.append(f"{short_title(exp)} · {'; '.join(stand)}.")
    return sentences


def in_bullets(question: str, *answers: str) -> str:
    """Markdown of what `opening` gives."""
    return "\n".join([f"**{question}**", "", *(f"- {answer}" for answer in answers)])


def _stands(exp: Experiment, method: str, other: str) -> str:
    lead = difference(exp, method, other)
    number = "" if lead is SAME else f" ({lead})"
    return f"{METHODS[method].label}: {_phrase(exp, lead)} {METHODS[other].label}{number}"


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


def judged_in_words(exp: Experiment) -> str:
    """The judged FLOP counts: 70, 60 and 50% of the FLOPs."""
    *first, last = [f"{100 * target:g}" for target in judged_targets(exp)]
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
