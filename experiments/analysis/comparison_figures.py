"""Figures of the comparison, the ablations and the report, in the style of figures.py."""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from experiments.analysis.figures import COLORS, LABELS, MARKERS, bars, curves, legend, logarithmic, new_figure
from experiments.methods import DENSE, PAPER
from experiments.stats import interval
from legr.graph import Graph
from legr.ranking import Ranking, select

QUESTIONS = {"targets": "FLOPs at which the search judges", "fitness.steps": "gradient steps τ̂ of the fitness"}


def idea(
    graph: Graph, norms: Sequence[Tensor], ranking: Ranking, target: float, floor: float, method: str, caption: str
) -> Figure:
    """The idea of a learned ranking: every filter's importance by layer, by norms alone and by Eq. 1, and one cut.

    Importance is that of the filter's unit, in which coupled filters are summed. What stays below the cut has its
    layer at the floor.
    """
    figure, axes = new_figure(pd.DataFrame(), caption, 11, 4.6, columns=2)
    rows, units = [], np.concatenate(graph.units)
    layers = np.repeat(np.arange(len(graph.units)), graph.widths) + 1
    plain = Ranking.norm_only(len(norms))
    titles = {
        "norm": "by norms alone: $\\Vert\\Theta_i\\Vert^2$",
        method: "learned (Eq. 1): $\\alpha_l\\Vert\\Theta_i\\Vert^2+\\kappa_l$",
    }
    for ax, (name, one) in zip(axes[0], {"norm": plain, method: ranking}.items(), strict=True):
        scores = one.scores(norms)
        kept = torch.cat(select(graph, scores, target, floor=floor)).numpy()
        importance = np.bincount(units + 1, torch.cat(scores).numpy())[1:][units]  # of a filter's unit
        part = pd.DataFrame({"panel": name, "layer": layers, "importance": importance, "kept": kept})
        rows.append(part[units >= 0])
        for stays, color, label in ((True, COLORS[name], "stays"), (False, "#B8B8B8", "goes")):
            points = rows[-1][rows[-1].kept == stays]
            shift = np.linspace(-0.3, 0.3, 7)[np.arange(len(points)) % 7]
            ax.scatter(points.layer + shift, points.importance, s=7, color=color, lw=0, label=label)
        ax.axhline(rows[-1].importance[~rows[-1].kept].max(), color=DENSE, lw=1, label="the cut")
        lowest = rows[-1].importance.min()
        if lowest > 0:
            ax.set_yscale("log")
        else:
            ax.set_yscale("symlog", linthresh=1, linscale=0.6)
        ax.set_ylim(0.8 * lowest if lowest > 0 else 1.2 * lowest, 1.6 * rows[-1].importance.max())
        ax.set(xlabel="prunable layer, in execution order", title=titles[name])
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, markerscale=2.5)
    axes[0, 0].set(ylabel="importance of a filter's unit")
    figure.data = pd.concat(rows)
    return figure


def hero(panels: Sequence[tuple[str, pd.DataFrame, Mapping[str, float]]], caption: str) -> Figure:
    """A row for each experiment: accuracy over FLOPs (left), and points over norm-only's mean (right).

    Args:
        panels: a title, a table as for `tradeoff`, and the dense network's record.
    """
    everything = pd.concat([table.assign(experiment=title) for title, table, _ in panels])
    columns = ["experiment", "method", "target", "trial", "flops", "accuracy"]
    figure, axes = new_figure(everything[columns], caption, 12, 3.6 * len(panels) + 0.8, rows=len(panels), columns=2)
    for (left, right), (title, table, dense) in zip(axes, panels, strict=True):
        base = "norm" if "norm" in set(table.method) else table.method[0]
        mean = table[table.method == base].groupby("target").accuracy.mean()
        less = table.assign(accuracy=table.accuracy - table.target.map(mean))
        for ax, part in ((left, table), (right, less)):
            groups = part.groupby(["method", "target"])
            points = pd.DataFrame({"y": 100 * groups.accuracy.mean(), "below": 100 * groups.accuracy.agg(interval)})
            curves(ax, points.reset_index().assign(x=lambda p: 100 * p.target, above=lambda p: p.below))
        left.axhline(100 * dense["accuracy"], color=DENSE, ls=":", lw=1.2, label="dense")
        left.set(xlabel="FLOPs left (%)", ylabel="test accuracy (%)", title=title)
        right.set(xlabel="FLOPs left (%)", ylabel=f"points over {LABELS[base]}", title=title)
    return legend(figure)


def networks(graph: Graph, kept: Mapping[tuple[str, float], Sequence[Tensor]], caption: str) -> Figure:
    """Small multiples: filters left in each layer over the dense, a row for each method, a column for each target."""
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
        axes[i, 0].set_ylabel(LABELS[method].replace(" (", "\n("), fontsize=10)
    figure.supylabel("filters", fontsize=11)
    return figure


def cost(table: pd.DataFrame, papers: Mapping[int, float], caption: str) -> Figure:
    """Hours for sets of networks (left), and how often a search each takes the time of one search (right).

    Args:
        table: columns method, networks, "one search", "a search each", ratio.
        papers: the ratio for numbers of networks, as counted from the authors' scripts, with AMC as the search each.
    """
    figure, (axes,) = new_figure(table, caption, 11, 4.4, columns=2)
    for method, part in table.groupby("method"):
        style = {"color": COLORS[method], "marker": MARKERS[method], "ms": 6}
        axes[0].plot(part.networks, part["one search"], label=f"{LABELS[method]}: one search for all", **style)
        axes[0].plot(part.networks, part["a search each"], ls="--", label=f"{LABELS[method]}: a search each", **style)
        axes[1].plot(part.networks, part.ratio, **style)
    axes[1].plot(
        list(papers),
        list(papers.values()),
        "x",
        color=PAPER,
        mew=2,
        ms=8,
        label="from the authors' CIFAR-100 scripts, against AMC",
    )
    for networks, ratio in papers.items():
        place = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center"}
        axes[1].annotate(f"{ratio:.2f}", (networks, ratio), color=PAPER, **place)
    axes[0].set(xlabel="networks in the set", ylabel="hours (search + fine-tuning)", ylim=(0, None))
    axes[1].set(xlabel="networks in the set", ylabel="a search each / one search", ylim=(0.9, None))
    handles = [handle for ax in axes for handle in ax.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize=10)
    return figure


def prediction(table: pd.DataFrame, correlations: pd.DataFrame, steps: int, caption: str) -> Figure:
    """Each fitness (column) against the accuracy after the same short fine-tuning, at each target (row)."""
    import seaborn

    rows, columns = correlations.target.nunique(), correlations.fitness.nunique()
    figure, axes = new_figure(table, caption, 4 * columns, 3.8 * rows + 0.6, rows, columns)
    style = {"hue": "source", "palette": COLORS, "style": "source", "markers": MARKERS, "s": 70}
    panels = correlations.sort_values("target", ascending=False, kind="stable").itertuples()
    for ax, panel in zip(axes.flat, panels, strict=True):
        part = table[table.target == panel.target].assign(percent=lambda t: 100 * t.accuracy)
        seaborn.scatterplot(part, x=panel.fitness, y="percent", ax=ax, **style)
        ax.legend_.remove()  # one for all, above
        ax.errorbar(part[panel.fitness], part.percent, 100 * part.deviation, ls="none", ecolor=PAPER, zorder=0)
        ax.set(xscale="log", xlabel=f"loss, {panel.fitness}", ylabel="")
        title = f"{panel.target:.0%} FLOPs · Spearman ρ = {panel.spearman:.2f}"
        ax.set_title(title.replace("-", "−"), fontsize=11)
    figure.supylabel(f"test accuracy (%), {steps} steps", fontsize=12)
    return legend(figure)


def tuning(table: pd.DataFrame, caption: str) -> Figure:
    """Held-out error over epochs of fine-tuning, a panel for each target: means over trials, some with 95% intervals.

    Args:
        table: columns method, target, trial, epoch (0: as pruned), val_accuracy.
    """
    targets, apart = sorted(table.target.unique(), reverse=True), math.ceil(table.epoch.max() / 5)
    if apart > 1:
        caption += f" · intervals: every {apart} epochs"  # more of them hide the curves
    figure, axes = new_figure(table, caption, 4 * len(targets), 4.6, columns=len(targets))
    for ax, target in zip(axes[0], targets, strict=True):
        errors = 100 - 100 * table[table.target == target].set_index(["method", "epoch"]).val_accuracy
        groups = errors.groupby(level=[0, 1])
        points = pd.DataFrame({"y": groups.mean(), "below": groups.agg(interval)}).reset_index()
        points["below"] = points.below.where(points.epoch % apart == 0)
        curves(ax, points.assign(x=points.epoch, above=points.below))
        logarithmic(ax)
        lowest = 0.8 * points.y.clip(lower=0.01).min()  # none may be wrong
        ax.set(xlabel="epochs of fine-tuning", title=f"{target:.0%} FLOPs", ylim=(lowest, 100))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set(ylabel="held-out error (%)")
    return legend(figure)


def order(table: pd.DataFrame, caption: str) -> Figure:
    """Which epoch of fine-tuning orders networks as the end does: Spearman's ρ over epochs, a line for each target.

    Args:
        table: columns target, epoch, spearman.
    """
    figure, ((ax,),) = new_figure(table, caption, 7, 4.2)
    targets = sorted(table.target.unique(), reverse=True)
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(targets)))
    for target, color in zip(targets, colors, strict=True):
        part = table[table.target == target]
        ax.plot(part.epoch, part.spearman, color=color, marker="o", ms=4, label=f"{target:.0%} FLOPs")
    ax.axhline(0, color=PAPER, lw=1)
    ax.set(xlabel="epochs of fine-tuning", ylabel="ρ with the final test accuracy", ylim=(-1, 1.05))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="lower right")
    return figure


def answers(table: pd.DataFrame, caption: str) -> Figure:
    """What a search depends on, a panel for each question: accuracy less norm-only's over targets.

    Intervals are over searches, or over seeds of the steps where each answer has one search.

    Args:
        table: columns question ("": norm-only), answer, trial (of several searches), target, seed, accuracy.
    """
    several = "trial" in table and table.trial.nunique() > 1
    norm_only = table[table.question == ""]
    if several:
        norm_only = norm_only.groupby("target").accuracy.mean()
        values = table.groupby(["question", "answer", "target", "trial"], sort=False).accuracy.mean()
        less = 100 * (values - norm_only.reindex(values.index, level="target"))
    else:
        values = table.set_index(["question", "answer", "target", "seed"]).accuracy
        norm_only = norm_only.set_index(["target", "seed"]).accuracy
        less = 100 * (values - norm_only.reindex(values.index.droplevel([0, 1])).to_numpy())
    less = less.sort_index()
    questions = table.question[table.question != ""].unique()
    figure, axes = new_figure(table, caption, 4.6 * len(questions), 4.6, columns=len(questions))
    for ax, question in zip(axes[0], questions, strict=True):
        if ax is not axes[0, 0]:
            ax.sharey(axes[0, 0])
        names = table.answer[table.question == question].unique()
        colors = plt.get_cmap("viridis")(np.linspace(0, 0.85, len(names)))
        for place, (name, color) in enumerate(zip(names, colors, strict=True)):
            groups = less.loc[question, name].groupby("target")
            x = 100 * groups.mean().index + place - (len(names) - 1) / 2  # a little apart, so that all bars show
            ax.errorbar(x, groups.mean(), groups.agg(interval), color=color, marker="o", capsize=3, label=name)
        ax.axhline(0, color=COLORS["norm"], ls="--", lw=1.2, label="norm-only")
        method, _, asked = question.rpartition(": ")
        ax.set(xlabel="FLOPs left (%)")
        ax.set_title(f"{QUESTIONS.get(asked, asked)}\n{LABELS.get(method, '')}", fontsize=11)
        ax.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3)
    axes[0, 0].set(ylabel="points of accuracy over norm-only's")
    return figure


def latency(table: pd.DataFrame, caption: str) -> Figure:
    """Latency over FLOPs, both relative to the dense network: medians with quartiles, a panel per batch size."""
    sizes = sorted(table.batch.unique())
    figure, axes = new_figure(table, caption, 5 * len(sizes), 4.6, columns=len(sizes))
    for ax, batch in zip(axes[0], sizes, strict=True):
        part = table[table.batch == batch]
        dense = part[part.method == "dense"].iloc[0]
        ax.plot([0, 1], [0, 1], color=PAPER, ls=":", lw=1.2, label="latency ∝ FLOPs")
        ax.plot(1, 1, "D", color=DENSE, label="dense")
        low, y, high = (part[column] / dense.latency_ms for column in ("low_ms", "latency_ms", "high_ms"))
        curves(ax, part.assign(x=part.flops / dense.flops, y=y, below=y - low, above=high - y))
        ax.set(xlabel="FLOPs / dense", ylabel="latency / dense", xlim=(0, 1.05), ylim=(0, None))
        ax.set_title(f"batch {batch} (dense: {dense.latency_ms:.1f} ms)")
    return legend(figure)
