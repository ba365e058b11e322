"""All figures: one style, each with a line that says which run it shows."""

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import IPython.display
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image
from torch import Tensor

from experiments.methods import DENSE, METHODS, PAPER
from legr.files import atomic, write_text
from legr.graph import Graph
from legr.ranking import Ranking

# matplotlib's copy of seaborn's style: importing seaborn takes a second, in every stage.
plt.style.use("seaborn-v0_8-whitegrid")
plt.rcParams |= {
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it, and it has every sign used
    "font.size": 12, "axes.titlesize": 12, "legend.fontsize": 11, "xtick.major.pad": 6, "ytick.major.pad": 6,
    "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True, "savefig.dpi": 160,
    "axes.grid.which": "both", "axes.formatter.min_exponent": 4,  # plain numbers along logarithmic axes
}  # fmt: skip

LABELS = {name: method.label for name, method in METHODS.items()} | {
    "random": "random ranking",
    "paper": "LeGR's authors (paper)",
}
COLORS = {name: method.color for name, method in METHODS.items()} | {"random": PAPER, "paper": PAPER}
MARKERS = {name: method.marker for name, method in METHODS.items()} | {"random": "X"}


def save(figure: Figure, path: str | Path) -> IPython.display.Image:
    """Write `path`.png and the numbers drawn as `path`.csv; returns the picture for display."""
    rendered = io.BytesIO()
    figure.savefig(rendered, format="png")
    with atomic(f"{path}.png") as temporary:  # a palette takes a third of the space
        Image.open(rendered).convert("RGB").quantize(256).save(temporary, "PNG", optimize=True)
    write_text(f"{path}.csv", figure.data.to_csv(index=False, float_format="%.6g"))
    plt.close(figure)
    caption = " ".join(figure.get_supxlabel().split())
    return IPython.display.Image(filename=f"{path}.png", width=round(80 * figure.get_figwidth()), alt=caption)


def new_figure(data: pd.DataFrame, caption: str, width: float, height: float, rows: int = 1, columns: int = 1):
    """Axes [rows, columns] on a figure that carries the numbers it shows (`.data`) and says which run they are of."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.data = data
    figure.supxlabel("\n".join(wrap(caption, int(14 * width))), fontsize=9, color="#555555")
    return figure, axes


def legend(figure: Figure, columns: int = 3) -> Figure:
    """Name what the first axes show, above all of them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, [LABELS.get(name, name) for name in names], loc="outside upper center", ncols=columns)
    return figure


def trials(ax: Axes, points: pd.DataFrame, joined: bool = True) -> None:
    """A dot for each trial, and a line through the means of each method; `points`: columns method, target, x, y."""
    for name in (name for name in METHODS if name in set(points.method)):
        shown = points[points.method == name]
        ax.plot(shown.x, shown.y, "o", ms=4, alpha=0.45, mew=0, color=COLORS[name])
        means = shown.groupby("target")[["x", "y"]].mean()
        style = {"color": COLORS[name], "marker": MARKERS[name], "label": LABELS[name], "ls": "-" if joined else ""}
        ax.plot(means.x, means.y, lw=1.6, ms=6, **style)


def dots(ax: Axes, values: pd.DataFrame) -> None:
    """A dot for each value and a bar for each mean of several, side by side in a category.

    Args:
        values: columns category and method, in the order drawn, and value.
    """
    categories, methods = (list(values[column].unique()) for column in ("category", "method"))
    width = 0.8 / len(methods)
    for (category, method), shown in values.groupby(["category", "method"], sort=False):
        x = categories.index(category) + width * (methods.index(method) - (len(methods) - 1) / 2)
        ax.plot([x] * len(shown), shown.value, "o", ms=5, alpha=0.55, mew=0, color=COLORS[method])
        if len(shown) > 1:
            ax.hlines(shown.value.mean(), x - 0.4 * width, x + 0.4 * width, color=COLORS[method], lw=3)
    ax.set_xticks(range(len(categories)), categories)
    ax.set_xlim(-0.5, len(categories) - 0.5)
    ax.grid(visible=False, axis="x")


def bars(ax: Axes, dense: Sequence[int], kept: Sequence[int], method: str, label: str = "kept") -> BarContainer:
    """Filters left in each layer, in the method's colour over the dense network's in grey; returns the former."""
    layers = range(1, len(dense) + 1)
    ax.bar(layers, dense, color="#E3E3E3", width=0.9, label="dense")
    ax.set(xlabel="prunable layer, in execution order", ylabel="filters", xlim=(0.3, len(dense) + 0.7))
    ax.grid(visible=False, axis="x")
    return ax.bar(layers, kept, color=COLORS[method], width=0.9, label=label)


def training(history: pd.DataFrame, caption: str) -> Figure:
    """Accuracy and learning rate over epochs, from the rows of `training.train`."""
    figure, axes = new_figure(history.drop(columns="seconds", errors="ignore"), caption, 10, 3.8, columns=2)
    names = {"train_accuracy": "training images (augmented)", "val_accuracy": "held-out images"}
    colors = dict(zip(names.values(), (PAPER, DENSE), strict=True))
    options = {"marker": "o" if len(history) < 10 else None, "legend": False}
    accuracy = 100 * history.set_index("epoch").filter(names).rename(columns=names)
    accuracy.plot(ax=axes[0, 0], color=colors, ylabel="accuracy (%)", **options)
    if "lr" in history:
        history.plot("epoch", "lr", ax=axes[0, 1], color=PAPER, ylabel="learning rate", **options)
    for ax in axes[0]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return legend(figure)


def _progress(ax: Axes, histories: Sequence[pd.DataFrame], method: str, shown: float = 0) -> None:
    """Each trial's candidates and the best loss so far over evaluations; the few worst lie on the upper edge.

    The edge is above most candidates and the loss `shown`.
    """
    together, style = pd.concat(histories), {"color": COLORS[method], "mew": 0}
    top = 1.1 * max(together.loss.quantile(0.9), shown)
    for trial, history in enumerate(histories):
        labels = ("candidate", "best so far") if trial == 0 else (None, None)
        ax.plot(history.evaluation, history.loss.where(history.loss <= top), ".", alpha=0.4, label=labels[0], **style)
        ax.step(history.evaluation, history.best.clip(upper=top), where="post", lw=2, label=labels[1], **style)
    worst = together.evaluation[together.loss > top]
    if len(worst):
        edge = [top] * len(worst)
        ax.plot(worst, edge, "^", ms=5, alpha=0.4, label="candidate above the axis", clip_on=False, **style)
    ax.set(xlabel="evaluation", ylabel="loss", xlim=(0.5, len(histories[0]) + 0.5))
    ax.set_ylim(top=top)


def search(histories: Sequence[pd.DataFrame], method: str, population: int, caption: str) -> Figure:
    """Each trial's candidates and the best loss so far over evaluations; norm-only's mean loss as a line."""
    together = pd.concat([h.assign(trial=trial) for trial, h in enumerate(histories)])
    figure, axes = new_figure(together[["trial", "evaluation", "loss", "best"]], caption, 7, 4.2)
    ax, norm = axes[0, 0], np.mean([history.loss[population - 1] for history in histories])
    _progress(ax, histories, method, norm)
    what = "mean of trials: " if len(histories) > 1 else ""
    ax.axhline(norm, color=COLORS["norm"], ls="--", lw=1.2, label=f"norm-only ({what}{norm:.2f})")
    ax.axvspan(0.5, population + 0.5, color="#000000", alpha=0.05, lw=0)
    ax.set(xlabel="evaluation (shaded: initial population)", ylabel="loss on held-out images")
    return legend(figure, columns=2)


def affine_maps(ranking: Ranking, deviations: Sequence[float], method: str, caption: str) -> Figure:
    """The learned α (log scale) and κ (in deviations of the layer's norms) of each layer."""
    data = pd.DataFrame({"layer": range(1, len(ranking.scale) + 1), "scale": ranking.scale, "shift": ranking.shift})
    data["shift_over_s"] = data["shift"] / np.asarray(deviations)
    figure, axes = new_figure(data, caption, 9, 5, rows=2)
    panels = ("scale", 1, "scale α"), ("shift_over_s", 0, "shift κ / s")
    for ax, (column, norm_only, label) in zip(axes[:, 0], panels, strict=True):
        stems = ax.stem(data.layer, data[column], COLORS[method], markerfmt="o", basefmt=" ", bottom=norm_only)
        stems.markerline.set(markersize=4)
        ax.axhline(norm_only, color=COLORS["norm"], ls="--", lw=1, label="norm-only (α = 1, κ = 0)")
        ax.set(ylabel=label, xlabel="prunable layer, in execution order")
        ax.label_outer()
    top = axes[0, 0]
    top.set(yscale="log")
    top.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    top.yaxis.set_major_formatter("{x:g}")
    top.minorticks_off()
    return legend(figure)


def widths(graph: Graph, kept: Mapping[str, Sequence[Tensor]], caption: str) -> Figure:
    """Filters left in each layer, a panel for each entry of `kept` ("method" or "method at 47%"), over the dense."""
    columns = {"name": [layer.name for layer in graph.layers], "dense": graph.widths}
    columns |= {name: [int(mask.sum()) for mask in masks] for name, masks in kept.items()}
    data = pd.DataFrame(columns, index=pd.RangeIndex(1, len(graph.layers) + 1, name="layer")).reset_index()
    figure, axes = new_figure(data, caption, 9, 1.9 * len(kept) + 0.6, rows=len(kept))
    for ax, (name, masks) in zip(axes[:, 0], kept.items(), strict=True):
        method, _, target = name.partition(" ")
        bars(ax, data.dense, data[name], method)
        named = f"{LABELS[method]} {target}".strip()
        title = f"{named} · {graph.flops(masks) / 1e6:.1f} MFLOPs (light grey: dense)"
        ax.set_title(title, loc="left", fontsize=11)
        ax.label_outer()
    return figure


def search_movie(
    graph: Graph, tried: Sequence[Sequence[int]], history: pd.DataFrame, name: str, path: str | Path, frames: int = 80
) -> str:
    """The search as a GIF: widths of the candidate on trial over those of the best so far, and its loss.

    Args:
        tried: widths [evaluations, layers] of every candidate.
        history: the rows of the search, one for each of `tried`.
        name: the method and what the title says of it, as in `widths`: "method at 47%".
        path: without its suffix.
        frames: at most so many evaluations are shown, evenly chosen, the last one included.

    Returns:
        An HTML image element that holds the GIF.
    """
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 4.4), dpi=72, height_ratios=(2, 1))
    method, _, about = name.partition(" ")
    best_bars = bars(top, graph.widths, graph.widths, method, "best so far")
    (now,) = top.plot(range(1, len(graph.layers) + 1), graph.widths, "_k", ms=6, mew=1.5, label="on trial")
    top.legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=3)
    title = top.set_title("\n", loc="left", fontsize=10)  # room for two lines
    _progress(bottom, [history], method)
    (dot,) = bottom.plot([], [], "ok", ms=5)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # the layout is settled; solving it again for every frame is slow
    images = []
    for i in np.unique(np.linspace(0, len(history) - 1, frames).round().astype(int)):
        now.set_ydata(tried[i])
        dot.set_data([history.evaluation[i]], [history.loss[i]])
        for bar, width in zip(best_bars, tried[history.loss[: i + 1].argmin()], strict=True):
            bar.set_height(width)
        state = f"evaluation {history.evaluation[i]} · best loss {history.best[i]:.3f}"
        title.set_text(f"{LABELS[method]} {about}\n{state}")
        figure.canvas.draw()
        images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(64))
    plt.close(figure)
    with atomic(f"{path}.gif") as temporary:
        pauses = [120] * (len(images) - 1) + [2500]  # milliseconds
        images[0].save(temporary, "GIF", save_all=True, append_images=images[1:], duration=pauses, loop=0)
        content = base64.b64encode(temporary.read_bytes()).decode()
    return f'<img alt="the search, animated" src="data:image/gif;base64,{content}">'


def tradeoff(
    table: pd.DataFrame, cuts: pd.DataFrame, dense: Mapping[str, float], papers: pd.DataFrame | None, caption: str
) -> Figure:
    """Accuracy over FLOPs, fine-tuned (left) and with BatchNorm recalibrated only (right): trials and their means.

    The figure of a single method shows all accuracies, so that those of several methods have the same axes.

    Args:
        table: columns method, target, trial, flops, accuracy, accuracy_recalibrated.
        cuts: columns method, flops, accuracy_recalibrated of the first trial at many FLOP counts.
        papers: columns network, mflops, accuracy_percent, source; None where the paper used other images.
    """
    figure, axes = new_figure(table.drop(columns="widths", errors="ignore"), caption, 11, 5, columns=2)
    titles = {"accuracy": "after fine-tuning: trials and their means"}
    titles["accuracy_recalibrated"] = "before, BatchNorm recalibrated (lines: first trial)"
    for ax, (column, title) in zip(axes[0], titles.items(), strict=True):
        trials(ax, table.assign(x=table.flops / 1e6, y=100 * table[column]), joined=column == "accuracy")
        ax.plot(dense["flops"] / 1e6, 100 * dense["accuracy"], "D", color=DENSE, label="dense")
        ax.set(xlabel="MFLOPs (one image)", ylabel="test accuracy (%)", title=title)
        if table.method.nunique() == 1:
            ax.set_ylim(0, 101)
    for method, curve in cuts.groupby("method"):
        axes[0, 1].plot(curve.flops / 1e6, 100 * curve.accuracy_recalibrated, color=COLORS[method], lw=1.5)
    if papers is not None:
        _quote(axes[0, 0], papers[papers.source.str.startswith("paper")])
    return legend(figure)


def _quote(ax: Axes, papers: pd.DataFrame) -> None:
    """The paper's networks as numbered circles, named in the lower right corner."""
    style = {"color": PAPER, "mfc": "white", "ms": 11, "ls": "", "label": "quoted networks (paper)"}
    ax.plot(papers.mflops, papers.accuracy_percent, "o", **style)
    for i, row in enumerate(papers.itertuples(), 1):
        ax.text(row.mflops, row.accuracy_percent, str(i), ha="center", va="center_baseline", fontsize=8)
    names = [f"{i}  {row.network}: {row.accuracy_percent}" for i, row in enumerate(papers.itertuples(), 1)]
    place = {"ha": "right", "va": "bottom", "fontsize": 9, "color": "#555555", "multialignment": "left"}
    background = {"facecolor": "white", "edgecolor": "none", "pad": 2}
    ax.text(0.98, 0.03, "\n".join(names), transform=ax.transAxes, bbox=background, **place)
