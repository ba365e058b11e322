"""Figures of the comparison, the ablations and the report, in the style of figures.py."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from experiments.analysis.figures import COLORS, LABELS, MARKERS, bars, dots, legend, new_figure
from experiments.methods import DENSE, METHODS, PAPER
from legr.graph import Graph
from legr.ranking import Ranking, select

QUESTIONS = {"targets": "FLOPs at which the search judges", "fitness.steps": "gradient steps τ̂ of the fitness"}


def idea(
    graph: Graph, norms: Sequence[Tensor], ranking: Ranking, target: float, floor: float, method: str, caption: str
) -> Figure:
    """The idea of a learned ranking: the place of each filter among all, by norms alone and by Eq. 1, and one cut.

    Filters that go together (a unit) are one dot, in the first of their layers. Layers whose output nothing activates
    are left out: their units reach over many layers.
    """
    figure, axes = new_figure(pd.DataFrame(), caption, 11, 4.6, columns=2)
    titles = {"norm": "by norms alone: $\\Vert\\Theta_i\\Vert^2$"}
    titles[method] = "learned (Eq. 1): $\\alpha_l\\Vert\\Theta_i\\Vert^2+\\kappa_l$"
    rankings, panels = {"norm": Ranking.norm_only(len(norms)), method: ranking}, []
    for ax, (name, title) in zip(axes[0], titles.items(), strict=True):
        scores = rankings[name].scores(norms)
        panel = _units(graph, scores, select(graph, scores, target, floor=floor)).assign(panel=name)
        panels.append(panel)
        for stays, color, label in ((True, COLORS[name], "stays"), (False, "#B8B8B8", "goes")):
            points = panel[panel.kept == stays]
            aside = np.linspace(-0.3, 0.3, 7)[np.arange(len(points)) % 7]
            ax.scatter(points.place + aside, points["rank"], s=7, color=color, lw=0, label=label)
        ax.axhline(panel["rank"][~panel.kept].max(), color=DENSE, lw=1, label="the cut")
        ax.set(xlabel="layer, in execution order", title=title, ylim=(-2, 102))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, markerscale=2.5)
    axes[0, 0].set(ylabel="place in the ranking of all filters (%)")
    figure.data = pd.concat(panels)
    return figure


def _units(graph: Graph, scores: Sequence[Tensor], kept: Sequence[Tensor]) -> pd.DataFrame:
    """Units that are activated: columns layer and place (of the first layer that has them), score, kept, rank (%)."""
    sums = np.zeros(len(graph.members))
    for units, layer_scores in zip(graph.units, scores, strict=True):
        np.add.at(sums, units[units >= 0], layer_scores.numpy()[units >= 0])
    shown, rows = set(), []
    for layer, units, mask in zip(graph.layers, graph.units, kept, strict=True):
        if layer.name in graph.unactivated or units[0] in shown or units[0] < 0:
            continue
        shown |= set(units.tolist())
        rows.append(pd.DataFrame({"layer": layer.name, "score": sums[units], "kept": mask.numpy()}))
    table = pd.concat([each.assign(place=place) for place, each in enumerate(rows, 1)])
    return table.assign(rank=100 * table.score.rank(pct=True))


def hero(panels: Mapping[str, pd.DataFrame], caption: str) -> Figure:
    """Points of test accuracy over norm-only's mean at each FLOP count: a dot a trial, a bar for the mean.

    Args:
        panels: by title, columns category, method, value, and star (the difference is one by docs/verdicts.md).
    """
    everything = pd.concat({title.partition("\n")[0]: table for title, table in panels.items()}, names=["experiment"])
    data = everything.reset_index(level=0)
    figure, axes = new_figure(data, caption, 10.5, 4.3, columns=len(panels))
    for ax, (title, table) in zip(axes[0], panels.items(), strict=True):
        dots(ax, table)
        ax.margins(y=0.1)  # room for stars
        ax.axhline(0, color=COLORS["norm"], lw=2, zorder=0)
        last = table.category.iloc[-1]
        ends = table[table.category == last].groupby("method").value.mean()
        _direct_labels(ax, pd.concat([ends, pd.Series({"norm": 0.0})]))
        methods, categories = list(table.method.unique()), list(table.category.unique())
        for (category, method), trials in table[table.star].groupby(["category", "method"]):
            x = categories.index(category) + 0.8 / len(methods) * (methods.index(method) - (len(methods) - 1) / 2)
            place = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 14}
            ax.annotate("*", (x, trials.value.max()), color=COLORS[method], **place)
        ax.set_xlabel("FLOPs left")
        ax.set_title(title, loc="left", fontsize=11)
    axes[0, 0].set_ylabel(f"points of test accuracy over {LABELS['norm']}")
    return figure


def _direct_labels(ax: Axes, ends: pd.Series) -> None:
    """The names of methods at the right edge, at the heights `ends` and at least a line of text apart."""
    low, high = ax.get_ylim()
    heights, line = ends.sort_values(), (high - low) / 15
    placed = heights.to_numpy().copy()
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + line)
    placed -= max(0, placed[-1] - high)
    for method, height in zip(heights.index, placed, strict=True):
        place = {"xytext": (6, 0), "textcoords": "offset points", "va": "center"}
        ax.annotate(LABELS[method], (ax.get_xlim()[1], height), color=COLORS[method], annotation_clip=False, **place)


VERDICTS = {  # colours of a tile and of its text, by the first word of a verdict: "equal within 0.5"
    "ahead": ("#1A7F37", "white"),
    "reproduced": ("#1A7F37", "white"),
    "equal": ("#BFDDF3", "black"),
    "by": ("#8FD19B", "black"),
    "partly": ("#8FD19B", "black"),
    "behind": ("#F0A27E", "black"),
    "not": ("#F0A27E", "black"),
    "undecided": ("#D9D9D9", "black"),
    "untested": ("#F2F2F2", "black"),
}


def tiles(claims: pd.DataFrame, titles: Mapping[str, str], caption: str) -> Figure:
    """The verdict on each claim (row) in each experiment (column).

    Args:
        claims: columns claim, experiment, verdict, evidence, number.
        titles: of experiments, by their names.
    """
    names = list(dict.fromkeys(claims.claim))
    figure, ((ax,),) = new_figure(claims, caption, 10.5, 0.33 * len(names) + 0.9)
    for row in claims.itertuples():
        color, text = VERDICTS[row.verdict.split()[0]]
        x, y = list(titles).index(row.experiment), names.index(row.claim)
        ax.add_patch(plt.Rectangle((x + 0.015, y + 0.05), 0.97, 0.9, color=color, lw=0))
        words = f"{row.verdict}  {row.number}".strip()
        ax.text(x + 0.5, y + 0.5, words, color=text, ha="center", va="center", fontsize=11)
    ax.set(xlim=(0, len(titles)), ylim=(len(names), 0))
    ax.set_xticks([x + 0.5 for x in range(len(titles))], list(titles.values()))
    ax.set_yticks([y + 0.5 for y in range(len(names))], names)
    ax.xaxis.tick_top()
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return figure


def networks(graph: Graph, kept: Mapping[tuple[str, float], Sequence[Tensor]], caption: str) -> Figure:
    """Small multiples: filters left in each layer before the dense, a row for each method, a column for each target."""
    methods, targets = (list(dict.fromkeys(column)) for column in zip(*kept, strict=True))
    columns = {f"{method} at {t:.0%}": [int(m.sum()) for m in masks] for (method, t), masks in kept.items()}
    data = pd.DataFrame({"layer": range(1, len(graph.layers) + 1), "dense": graph.widths} | columns)
    figure, axes = new_figure(data, caption, 3.3 * len(targets), 1.5 * len(methods) + 0.8, len(methods), len(targets))
    for i, method in enumerate(methods):
        for j, target in enumerate(targets):
            ax = axes[i, j]
            bars(ax, graph.widths, data[f"{method} at {target:.0%}"], method)
            ax.set(ylabel="", xlabel="prunable layer")
            if i == 0:
                ax.set_title(f"{target:.0%} FLOPs")
            ax.label_outer()
        axes[i, 0].set_ylabel(f"{LABELS[method]}\nfilters", fontsize=10)
    figure.legend(axes[0, 0].containers[:1], ["filters of the dense network"], loc="outside upper right")
    return figure


def cost(table: pd.DataFrame, caption: str) -> Figure:
    """Hours for sets of networks (left), and how often a search each takes the time of one search (right).

    Args:
        table: columns method, networks, "one search", "a search each", ratio.
    """
    figure, (axes,) = new_figure(table, caption, 11, 4.4, columns=2)
    for method, costs in table.groupby("method"):
        style = {"color": COLORS[method], "marker": MARKERS[method], "ms": 6}
        axes[0].plot(costs.networks, costs["one search"], label=f"{LABELS[method]}: one search for all", **style)
        axes[0].plot(costs.networks, costs["a search each"], ls="--", label=f"{LABELS[method]}: a search each", **style)
        axes[1].plot(costs.networks, costs.ratio, **style)
    axes[0].set(xlabel="networks in the set", ylabel="hours (search + fine-tuning)", ylim=(0, None))
    axes[1].set(xlabel="networks in the set", ylabel="a search each / one search", ylim=(0.9, None))
    return legend(figure, columns=2)


def prediction(table: pd.DataFrame, correlations: pd.DataFrame, steps: int, caption: str) -> Figure:
    """A fitness in each panel against the accuracy after the same short fine-tuning.

    Args:
        table: columns target, source, accuracy, deviation (over seeds), and one for each fitness.
        correlations: a row for each panel: target, fitness, spearman.
    """
    figure, axes = new_figure(table, caption, 5 * len(correlations), 4.6, columns=len(correlations))
    searches = [source for source in table.source.unique() if source not in ("norm", "random")]
    looks = dict(zip(searches, METHODS, strict=False))  # a search looks as a method does, in the order of their tables
    for ax, panel in zip(axes[0], correlations.itertuples(), strict=True):
        at_target = table[table.target == panel.target]
        for source, rankings in at_target.groupby("source", sort=False):
            look = looks.get(source, source)
            style = {"color": COLORS[look], "marker": MARKERS[look], "ls": "", "ms": 7}
            percent, error = 100 * rankings.accuracy, 100 * rankings.deviation
            ax.errorbar(rankings[panel.fitness], percent, error, ecolor=PAPER, elinewidth=1, label=source, **style)
        ax.set(xscale="log", xlabel=f"loss, {panel.fitness}", ylabel=f"test accuracy (%), {steps} steps")
        title = f"{panel.target:.0%} FLOPs · Spearman ρ = {panel.spearman:.2f}"
        ax.set_title(title.replace("-", "−"))
    return legend(figure)


def tuning(table: pd.DataFrame, caption: str) -> Figure:
    """Held-out accuracy over norm-only's mean after each epoch of fine-tuning: trials (thin) and their means.

    Args:
        table: columns method, target, trial, epoch (0, as pruned, is not drawn: it is far off), val_accuracy.
    """
    table = table[table.epoch > 0]
    norm_only = table[table.method == "norm"].groupby(["target", "epoch"]).val_accuracy.mean().rename("norm_only")
    table = table.join(norm_only, on=["target", "epoch"])
    table = table.assign(points=100 * (table.val_accuracy - table.norm_only))
    targets = sorted(table.target.unique(), reverse=True)
    figure, axes = new_figure(table, caption, 11, 3.2 * len(targets) / 2 + 1, -(-len(targets) // 2), 2)
    for ax, target in zip(axes.flat, targets, strict=False):
        at_target = table[table.target == target]
        for method in (name for name in METHODS if name in set(at_target.method)):
            curves = at_target[at_target.method == method].pivot(index="epoch", columns="trial", values="points")
            if method != "norm":
                ax.plot(curves.index, curves, color=COLORS[method], lw=0.8, alpha=0.5)
            ax.plot(curves.index, curves.mean(axis=1), color=COLORS[method], lw=2, label=LABELS[method])
        ax.set(title=f"{target:.0%} FLOPs", xlabel="epochs of fine-tuning", ylabel="points over norm-only")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    for ax in axes.flat[len(targets) :]:
        ax.remove()
    return legend(figure, columns=4)


def order(table: pd.DataFrame, caption: str) -> Figure:
    """Which epoch of fine-tuning orders networks as the end does: Spearman's ρ over epochs, a line for each target.

    Args:
        table: columns target, epoch, spearman.
    """
    figure, ((ax,),) = new_figure(table, caption, 7, 4.2)
    targets = sorted(table.target.unique(), reverse=True)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(targets)))
    for target, color in zip(targets, colors, strict=True):
        epochs = table[table.target == target]
        ax.plot(epochs.epoch, epochs.spearman, color=color, marker="o", ms=4, label=f"{target:.0%} FLOPs")
    ax.axhline(0, color=PAPER, lw=1)
    ax.set(xlabel="epochs of fine-tuning", ylabel="ρ with the final test accuracy", ylim=(-1, 1.05))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="lower right")
    return figure


def answers(table: pd.DataFrame, caption: str) -> Figure:
    """What a search depends on, a panel for each question: accuracy less norm-only's mean, a dot for each search.

    Args:
        table: columns question ("": norm-only), answer, trial (of a search), accuracy: of the judged targets and of
            several seeds of the steps, whose mean a dot shows.
    """
    values = 100 * table.groupby(["question", "answer", "trial"], sort=False).accuracy.mean()
    values = (values - values[""].mean()).drop("").rename("value").reset_index()
    questions = list(values.question.unique())
    figure, axes = new_figure(values, caption, 5 * len(questions), 4.4, columns=len(questions))
    for ax, question in zip(axes[0], questions, strict=True):
        ax.sharey(axes[0, 0])
        asked = values[values.question == question].rename(columns={"answer": "category"})
        dots(ax, asked.assign(method="legr"))
        ax.axhline(0, color=COLORS["norm"], lw=2, zorder=0, label=LABELS["norm"])
        ax.set_xlabel(QUESTIONS.get(question, question))
    axes[0, 0].set(ylabel="points of accuracy over norm-only's")
    return legend(figure)


def latency(table: pd.DataFrame, caption: str) -> Figure:
    """Latency over FLOPs, both relative to the dense network: medians with quartiles, a panel per batch size."""
    sizes = sorted(table.batch.unique())
    figure, axes = new_figure(table, caption, 5 * len(sizes), 4.6, columns=len(sizes))
    for ax, batch in zip(axes[0], sizes, strict=True):
        times = table[table.batch == batch]
        dense = times[times.method == "dense"].iloc[0]
        ax.plot([0, 1], [0, 1], color=PAPER, ls=":", lw=1.2, label="latency ∝ FLOPs")
        ax.plot(1, 1, "D", color=DENSE, label="dense")
        for method in (name for name in METHODS if name in set(times.method)):
            shown = times[times.method == method].sort_values("flops")
            low, y, high = (shown[column] / dense.latency_ms for column in ("low_ms", "latency_ms", "high_ms"))
            style = {"color": COLORS[method], "marker": MARKERS[method], "label": LABELS[method]}
            ax.errorbar(shown.flops / dense.flops, y, (y - low, high - y), lw=1.6, ms=6, capsize=2.5, **style)
        ax.set(xlabel="FLOPs / dense", ylabel="latency / dense", xlim=(0, 1.05), ylim=(0, None))
        ax.set_title(f"batch {batch} (dense: {dense.latency_ms:.1f} ms)")
    return legend(figure)
