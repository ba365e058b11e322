"""All figures: one style, each with a line that says which run it shows."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image
from torch import Tensor

from experiments.methods import DENSE, METHODS, PAPER
from legr.files import atomic, write_text
from legr.graph import Graph
from legr.ranking import Ranking

# matplotlib's copy of seaborn's style: importing seaborn itself takes seconds, in every stage.
plt.style.use(["seaborn-v0_8-whitegrid", "seaborn-v0_8-notebook"])
plt.rcParams |= {
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it, and it has every sign used
    "font.size": 13, "axes.labelsize": 13, "axes.titlesize": 13, "xtick.labelsize": 12, "ytick.labelsize": 12,
    "legend.fontsize": 11, "figure.dpi": 100, "savefig.dpi": 160, "figure.constrained_layout.use": True,
    "svg.hashsalt": "legr", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.facecolor": "white",
}  # fmt: skip


def save(figure: Figure, path: str | Path) -> Figure:
    """Write `path`.svg, `path`.png and the numbers drawn as `path`.csv; returns the figure for display."""
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        with atomic(f"{path}{suffix}") as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
    write_text(f"{path}.csv", figure.data.to_csv(index=False, float_format="%.6g"))
    plt.close(figure)
    return figure


def interval(values: pd.Series) -> float:
    """Half the width of the mean's 95% interval (Student's t); NaN for a single value."""
    from scipy.stats import t

    return float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.nan


def _figure(data: pd.DataFrame, caption: str, columns: int = 1, width: float = 7.0, height: float = 4.2, rows: int = 1):
    """Axes [rows, columns] on a figure that carries the numbers it shows (`.data`) and says which run they are of."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.data = data
    figure.supxlabel("\n".join(wrap(caption, int(14 * width))), fontsize=9, color="#555555")
    return figure, axes


def _losses(ax: Axes, which: str, values: pd.Series) -> None:
    """Scale an axis ("x" or "y") of positive values: logarithmic where they span a wide range; plain numbers."""
    axis = getattr(ax, f"{which}axis")
    if max(values) > 4 * min(values) > 0:
        ax.set(**{f"{which}scale": "log"})
        span = max(values) / min(values)
        steps = (1, 1.5, 2, 3, 5, 7) if span < 20 else (1, 2, 5) if span < 200 else (1,)
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def training(history: pd.DataFrame, caption: str) -> Figure:
    """Accuracy and learning rate over epochs, from the rows of `training.train`."""
    figure, axes = _figure(history.drop(columns="seconds", errors="ignore"), caption, 2, 10, 3.8)
    left, right = axes[0]
    marker = "o" if len(history) < 10 else None
    lines = {"train_accuracy": (PAPER, "training images (augmented)"), "val_accuracy": (DENSE, "held-out images")}
    for column, (color, label) in lines.items():
        if column in history:
            left.plot(history.epoch, 100 * history[column], color=color, label=label, marker=marker)
    left.set(xlabel="epoch", ylabel="accuracy (%)")
    left.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    if "lr" in history:
        right.plot(history.epoch, history.lr, color=PAPER, marker=marker)
    right.set(xlabel="epoch", ylabel="learning rate")
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def search(histories: Sequence[pd.DataFrame], method: str, population: int, caption: str) -> Figure:
    """Each trial's candidates and the best loss so far over evaluations; norm-only's loss as a line."""
    together = pd.concat([h.assign(trial=trial) for trial, h in enumerate(histories)])
    figure, axes = _figure(together[["trial", "evaluation", "loss", "best"]], caption)
    ax, color = axes[0, 0], METHODS[method].color
    for trial, history in enumerate(histories):
        first = trial == 0
        label = "candidate" if first else None
        ax.scatter(history.evaluation, history.loss, s=10, color=color, alpha=0.4, label=label, linewidths=0)
        ax.plot(history.evaluation, history.best, color=color, lw=2, label="best so far" if first else None)
    norm = histories[0].loss[population - 1]
    ax.axhline(norm, color=METHODS["norm"].color, ls="--", lw=1.2, label=f"norm-only ({norm:.2f})")
    ax.axvspan(0.5, population + 0.5, color="#000000", alpha=0.05, lw=0)
    ax.set(xlabel="evaluation (shaded: initial population)", ylabel="loss on held-out images")
    ax.set(xlim=(0.5, len(histories[0]) + 0.5))
    _losses(ax, "y", together.loss)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3)  # points are everywhere inside
    return figure


def affine_maps(ranking: Ranking, deviations: Sequence[float], method: str, caption: str) -> Figure:
    """The learned α (log scale) and κ (in deviations of the layer's norms) of each layer."""
    layers = range(1, len(ranking.scale) + 1)
    shift = [k / s for k, s in zip(ranking.shift, deviations, strict=True)]
    data = pd.DataFrame({"layer": layers, "scale": ranking.scale, "shift": ranking.shift, "shift_over_s": shift})
    figure, axes = _figure(data, caption, 1, 9, 5, rows=2)
    color, norm = METHODS[method].color, METHODS["norm"].color
    for ax, values, base, label in (
        (axes[0, 0], ranking.scale, 1, "scale α"),
        (axes[1, 0], shift, 0, "shift κ / s"),
    ):
        ax.vlines(layers, base, values, color=color)
        ax.plot(layers, values, "o", ms=4, color=color)
        ax.axhline(base, color=norm, ls="--", lw=1, label="norm-only (α = 1, κ = 0)")
        ax.set(ylabel=label)
    _losses(axes[0, 0], "y", ranking.scale)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper right")
    axes[1, 0].set(xlabel="prunable layer, in execution order")
    return figure


def widths(graph: Graph, kept: Mapping[str, Sequence[Tensor]], caption: str) -> Figure:
    """Filters left in each layer, a panel for each entry of `kept` ("method" or "method at 47%"), over the dense."""
    layers = range(1, len(graph.layers) + 1)
    data = pd.DataFrame({"layer": layers, "name": [layer.name for layer in graph.layers], "dense": graph.widths})
    data = data.assign(**{name: [int(m.sum()) for m in masks] for name, masks in kept.items()})
    figure, axes = _figure(data, caption, 1, 9, 1.9 * len(kept) + 0.6, rows=len(kept))
    for ax, (name, masks) in zip(axes[:, 0], kept.items(), strict=True):
        method, _, target = name.partition(" ")
        ax.bar(layers, graph.widths, color="#E3E3E3", width=0.9)
        ax.bar(layers, data[name], color=METHODS[method].color, width=0.9)
        ax.set(ylabel="filters", xlim=(0.3, len(graph.layers) + 0.7))
        ax.grid(visible=False, axis="x")
        title = f"{METHODS[method].label} {target} · {graph.flops(masks) / 1e6:.1f} MFLOPs (grey: dense)"
        ax.set_title(title, loc="left", fontsize=11)
    axes[-1, 0].set_xlabel("prunable layer, in execution order")
    return figure


def search_movie(
    graph: Graph, tried: Sequence[Sequence[int]], history: pd.DataFrame, method: str, path: str | Path, frames: int = 80
) -> str:
    """The search as a GIF: widths of the candidate on trial over those of the best so far, and its loss.

    Args:
        tried: widths [evaluations, layers] of every candidate.
        history: the rows of the search, one for each of `tried`.
        path: without its suffix.
        frames: at most so many evaluations are shown, evenly chosen, the last one included.

    Returns:
        An HTML image element that holds the GIF.
    """
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.4), dpi=72, height_ratios=(2, 1))
    layers, color = range(1, len(graph.layers) + 1), METHODS[method].color
    top.bar(layers, graph.widths, color="#E3E3E3", width=0.9, label="dense")
    best_bars = top.bar(layers, graph.widths, color=color, width=0.9, label="best so far")
    (now,) = top.plot(layers, graph.widths, "_", color="#000000", ms=6, mew=1.5, label="on trial")
    top.set(xlabel="prunable layer, in execution order", ylabel="filters", xlim=(0.3, len(graph.layers) + 0.7))
    top.grid(visible=False, axis="x")
    top.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    title = top.set_title(" ", loc="left", fontsize=10)
    bottom.plot(history.evaluation, history.loss, ".", color=color, alpha=0.3, ms=4, mew=0)
    bottom.plot(history.evaluation, history.best, color=color, lw=1.5)
    (dot,) = bottom.plot([], [], "o", color="#000000", ms=5)
    bottom.set(xlabel="evaluation", ylabel="loss", xlim=(0.5, len(history) + 0.5))
    _losses(bottom, "y", history.loss)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # the layout is settled; solving it again for every frame is slow
    images, last = [], len(history) - 1
    for i in sorted({round(last * k / (frames - 1)) for k in range(frames)}):
        row, best = history.iloc[i], int(history.loss[: i + 1].argmin())
        now.set_ydata(tried[i])
        dot.set_data([row.evaluation], [row.loss])
        for bar, width in zip(best_bars, tried[best], strict=True):
            bar.set_height(width)
        title.set_text(f"{METHODS[method].label} · evaluation {int(row.evaluation)} · best loss {row.best:.3f}")
        figure.canvas.draw()
        images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(64))
    plt.close(figure)
    with atomic(f"{path}.gif") as temporary:
        pauses = [120] * (len(images) - 1) + [2500]  # milliseconds
        images[0].save(temporary, "GIF", save_all=True, append_images=images[1:], duration=pauses, loop=0)
        content = temporary.read_bytes()
    return f'<img alt="the search, animated" src="data:image/gif;base64,{base64.b64encode(content).decode()}">'


def tradeoff(table: pd.DataFrame, dense: Mapping[str, float], papers: pd.DataFrame | None, caption: str) -> Figure:
    """Accuracy over FLOPs, fine-tuned (left) and with BatchNorm recalibrated only (right): means, 95% intervals.

    Args:
        table: columns method, target, trial, flops, accuracy, accuracy_recalibrated.
        papers: columns network, mflops, accuracy_percent of the paper's networks; None where other images were used.
    """
    figure, axes = _figure(table.drop(columns=["widths"], errors="ignore"), caption, 2, 11, 5)
    methods = [m for m in METHODS.values() if m.name in set(table.method)]
    for ax, column, title in zip(
        axes[0],
        ("accuracy", "accuracy_recalibrated"),
        ("after fine-tuning", "before: BatchNorm recalibrated, weights as they were"),
        strict=True,
    ):
        for order, method in enumerate(methods):  # each curve is thinner than those under it: all show
            groups = table[table.method == method.name].groupby("target")
            x, y = groups.flops.mean() / 1e6, 100 * groups[column].mean()
            rim = 1.5 * (len(methods) - 1 - order)
            ax.errorbar(
                x, y, 100 * groups[column].agg(interval).fillna(0), color=method.color, marker=method.marker,
                label=method.label, lw=2 + rim / 2, ms=6 + rim, capsize=3,
            )  # fmt: skip
        ax.plot(dense["flops"] / 1e6, 100 * dense["accuracy"], "D", color=DENSE, label="dense")
        ax.set(xlabel="MFLOPs (one image)", ylabel="test accuracy (%)")
        ax.set_title(title, fontsize=12)
    if papers is not None:
        axes[0, 0].plot(papers.mflops, papers.accuracy_percent, "x", color=PAPER, mew=2, label="paper")
        for row in papers.itertuples():
            offset = {"textcoords": "offset points", "fontsize": 8, "color": "#555555"}
            axes[0, 0].annotate(row.network, (row.mflops, row.accuracy_percent), (5, 4), **offset)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def prediction(table: pd.DataFrame, correlations: pd.DataFrame, steps: int, caption: str) -> Figure:
    """Each fitness (column) against the accuracy after the same short fine-tuning, at each target (row)."""
    import seaborn as sns

    kinds, targets = list(correlations.fitness.unique()), sorted(table.target.unique(), reverse=True)
    figure, axes = _figure(table, caption, len(kinds), 4 * len(kinds), 3.8 * len(targets) + 0.6, len(targets))
    colors = {name: method.color for name, method in METHODS.items()} | {"random": PAPER}
    markers = {name: method.marker for name, method in METHODS.items()} | {"random": "X"}
    spearman = correlations.set_index(["target", "fitness"]).spearman
    for row, target in zip(axes, targets, strict=True):
        part = table[table.target == target].assign(percent=lambda t: 100 * t.accuracy)
        for ax, kind in zip(row, kinds, strict=True):
            sns.scatterplot(
                part, x=kind, y="percent", hue="source", palette=colors, style="source", markers=markers, s=50, ax=ax,
                legend=False,
            )  # fmt: skip
            ax.errorbar(part[kind], part.percent, 100 * part.deviation.fillna(0), ls="none", ecolor=PAPER, zorder=0)
            _losses(ax, "x", part[kind])
            ax.set(xlabel=f"loss, {kind}", ylabel="")
            ax.set_title(
                f"{target:.0%} FLOPs · Spearman ρ = {spearman[target, kind]:.2f}".replace("-", "−"), fontsize=11
            )
        row[0].set_ylabel(f"test accuracy (%), {steps} steps")
    shown = [s for s in markers if s in set(table.source)]
    marks = [plt.Line2D([], [], color=colors[s], marker=markers[s], ls="none") for s in shown]
    labels = [METHODS[s].label if s in METHODS else "random ranking" for s in shown]
    figure.legend(marks, labels, loc="outside upper center", ncols=2 if len(kinds) < 3 else 4)
    return figure


def latency(table: pd.DataFrame, caption: str) -> Figure:
    """Latency over FLOPs, both relative to the dense network: medians with quartiles, a panel per batch size."""
    sizes = sorted(table.batch.unique())
    figure, axes = _figure(table, caption, len(sizes), 5 * len(sizes), 4.6)
    for ax, batch in zip(axes[0], sizes, strict=True):
        part = table[table.batch == batch]
        dense = part[part.method == "dense"].iloc[0]
        ax.plot([0, 1], [0, 1], color=PAPER, ls=":", lw=1.2, label="latency ∝ FLOPs")
        ax.plot(1, 1, "D", color=DENSE, label="dense")
        for method in [m for m in METHODS.values() if m.name in set(part.method)]:
            rows = part[part.method == method.name].sort_values("flops")
            spread = [rows.latency_ms - rows.low_ms, rows.high_ms - rows.latency_ms] / dense.latency_ms
            ax.errorbar(
                rows.flops / dense.flops, rows.latency_ms / dense.latency_ms, spread, color=method.color,
                marker=method.marker, label=method.label, capsize=3,
            )  # fmt: skip
        ax.set(xlabel="FLOPs / dense", ylabel="latency / dense", xlim=(0, 1.05), ylim=(0, None))
        ax.set_title(f"batch {batch} (dense: {dense.latency_ms:.1f} ms)", fontsize=12)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure
