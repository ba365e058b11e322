"""All figures: one style, each with a line that says which run it shows."""

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import wrap

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image
from torch import Tensor

from experiments.methods import DENSE, METHODS, PAPER
from experiments.stats import interval
from legr.files import atomic, write_text
from legr.graph import Graph
from legr.ranking import Ranking, select

# matplotlib's copy of seaborn's style. seaborn itself is imported where it draws: it takes a second, in every stage.
plt.style.use("seaborn-v0_8-whitegrid")
plt.rcParams |= {
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it, and it has every sign used
    "font.size": 12, "axes.titlesize": 12, "legend.fontsize": 11, "xtick.major.pad": 6, "ytick.major.pad": 6,
    "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True, "savefig.dpi": 160,
    "axes.grid.which": "both", "axes.formatter.min_exponent": 4,  # plain numbers along logarithmic axes
    "svg.hashsalt": "legr",
}  # fmt: skip

LABELS = {name: method.label for name, method in METHODS.items()} | {
    "random": "random ranking",
    "paper": "LeGR's authors (paper)",
}
COLORS = {name: method.color for name, method in METHODS.items()} | {"random": PAPER, "paper": PAPER}
QUESTIONS = {"targets": "FLOPs at which the search judges", "fitness.steps": "gradient steps τ̂ of the fitness"}
MARKERS = {name: method.marker for name, method in METHODS.items()} | {"random": "X"}


def save(figure: Figure, path: str | Path) -> Figure:
    """Write `path`.svg, `path`.png and the numbers drawn as `path`.csv; returns the figure for display."""
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        with atomic(f"{path}{suffix}") as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
    write_text(f"{path}.csv", figure.data.to_csv(index=False, float_format="%.6g"))
    plt.close(figure)
    return figure


def _figure(data: pd.DataFrame, caption: str, width: float, height: float, rows: int = 1, columns: int = 1):
    """Axes [rows, columns] on a figure that carries the numbers it shows (`.data`) and says which run they are of."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.data = data
    figure.supxlabel("\n".join(wrap(caption, int(14 * width))), fontsize=9, color="#555555")
    return figure, axes


def _legend(figure: Figure, columns: int = 3) -> Figure:
    """Name what the first axes show, above all of them."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, [LABELS.get(name, name) for name in names], loc="outside upper center", ncols=columns)
    return figure


def _curves(ax: Axes, points: pd.DataFrame, joined: bool = True) -> None:
    """A curve for each method; `points`: columns method, x, y, and the lengths `below` and `above` of error bars.

    Methods lie a little apart along x, so that the error bars of all show.
    """
    methods = [name for name in METHODS if name in set(points.method)]
    apart = 0.014 * (points.x.max() - points.x.min())
    for place, name in enumerate(methods):
        part = points[points.method == name].sort_values("x")
        looks = {"color": COLORS[name], "marker": MARKERS[name], "label": LABELS[name], "ls": "-" if joined else ""}
        x = part.x + apart * (place - (len(methods) - 1) / 2)
        ax.errorbar(x, part.y, (part.below, part.above), lw=1.6, ms=6, capsize=2.5, **looks)


def _log(ax: Axes) -> None:
    """A logarithmic y axis, with numbers at 1, 2, 5, 10, ..."""
    ax.set(yscale="log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.minorticks_off()


def bars(ax: Axes, dense: Sequence[int], kept: Sequence[int], method: str, label: str = "kept") -> BarContainer:
    """Filters left in each layer, in the method's colour over the dense network's in grey; returns the former."""
    layers = range(1, len(dense) + 1)
    ax.bar(layers, dense, color="#E3E3E3", width=0.9, label="dense")
    ax.set(xlabel="prunable layer, in execution order", ylabel="filters", xlim=(0.3, len(dense) + 0.7))
    ax.grid(visible=False, axis="x")
    return ax.bar(layers, kept, color=COLORS[method], width=0.9, label=label)


def training(history: pd.DataFrame, caption: str) -> Figure:
    """Accuracy and learning rate over epochs, from the rows of `training.train`."""
    figure, axes = _figure(history.drop(columns="seconds", errors="ignore"), caption, 10, 3.8, columns=2)
    names = {"train_accuracy": "training images (augmented)", "val_accuracy": "held-out images"}
    colors = dict(zip(names.values(), (PAPER, DENSE), strict=True))
    options = {"marker": "o" if len(history) < 10 else None, "legend": False}
    accuracy = 100 * history.set_index("epoch").filter(names).rename(columns=names)
    accuracy.plot(ax=axes[0, 0], color=colors, ylabel="accuracy (%)", **options)
    if "lr" in history:
        history.plot("epoch", "lr", ax=axes[0, 1], color=PAPER, ylabel="learning rate", **options)
    for ax in axes[0]:
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _legend(figure)


def _progress(ax: Axes, histories: Sequence[pd.DataFrame], method: str, shown: float = 0) -> None:
    """Each trial's candidates and the best loss so far over evaluations; the few worst lie on the upper edge.

    The edge is above most candidates and the loss `shown`.
    """
    together, looks = pd.concat(histories), {"color": COLORS[method], "mew": 0}
    top = 1.1 * max(together.loss.quantile(0.9), shown)
    for trial, history in enumerate(histories):
        labels = ("candidate", "best so far") if trial == 0 else (None, None)
        ax.plot(history.evaluation, history.loss.where(history.loss <= top), ".", alpha=0.4, label=labels[0], **looks)
        ax.plot(history.evaluation, history.best.clip(upper=top), lw=2, label=labels[1], **looks)
    worst = together.evaluation[together.loss > top]
    if len(worst):
        edge = [top] * len(worst)
        ax.plot(worst, edge, "^", ms=5, alpha=0.4, label="candidate above the axis", clip_on=False, **looks)
    ax.set(xlabel="evaluation", ylabel="loss", xlim=(0.5, len(histories[0]) + 0.5), yscale="log")
    ax.set_ylim(top=top)


def search(histories: Sequence[pd.DataFrame], method: str, population: int, caption: str) -> Figure:
    """Each trial's candidates and the best loss so far over evaluations; norm-only's mean loss as a line."""
    together = pd.concat([h.assign(trial=trial) for trial, h in enumerate(histories)])
    figure, axes = _figure(together[["trial", "evaluation", "loss", "best"]], caption, 7, 4.2)
    ax, norm = axes[0, 0], np.mean([history.loss[population - 1] for history in histories])
    _progress(ax, histories, method, norm)
    what = "mean of trials: " * (len(histories) > 1)
    ax.axhline(norm, color=COLORS["norm"], ls="--", lw=1.2, label=f"norm-only ({what}{norm:.2f})")
    ax.axvspan(0.5, population + 0.5, color="#000000", alpha=0.05, lw=0)
    ax.set(xlabel="evaluation (shaded: initial population)", ylabel="loss on held-out images")
    return _legend(figure, columns=2)


def affine_maps(ranking: Ranking, deviations: Sequence[float], method: str, caption: str) -> Figure:
    """The learned α (log scale) and κ (in deviations of the layer's norms) of each layer."""
    data = pd.DataFrame({"layer": range(1, len(ranking.scale) + 1), "scale": ranking.scale, "shift": ranking.shift})
    data["shift_over_s"] = data["shift"] / np.asarray(deviations)
    figure, axes = _figure(data, caption, 9, 5, rows=2)
    panels = ("scale", 1, "scale α"), ("shift_over_s", 0, "shift κ / s")
    for ax, (column, norm_only, label) in zip(axes[:, 0], panels, strict=True):
        stems = ax.stem(data.layer, data[column], COLORS[method], markerfmt="o", basefmt=" ", bottom=norm_only)
        stems.markerline.set(markersize=4)
        ax.axhline(norm_only, color=COLORS["norm"], ls="--", lw=1, label="norm-only (α = 1, κ = 0)")
        ax.set(ylabel=label, xlabel="prunable layer, in execution order")
        ax.label_outer()
    _log(axes[0, 0])
    return _legend(figure)


def widths(graph: Graph, kept: Mapping[str, Sequence[Tensor]], caption: str) -> Figure:
    """Filters left in each layer, a panel for each entry of `kept` ("method" or "method at 47%"), over the dense."""
    columns = {"name": [layer.name for layer in graph.layers], "dense": graph.widths}
    columns |= {name: [int(mask.sum()) for mask in masks] for name, masks in kept.items()}
    data = pd.DataFrame(columns, index=pd.RangeIndex(1, len(graph.layers) + 1, name="layer")).reset_index()
    figure, axes = _figure(data, caption, 9, 1.9 * len(kept) + 0.6, rows=len(kept))
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


def idea(
    graph: Graph, norms: Sequence[Tensor], ranking: Ranking, target: float, floor: float, method: str, caption: str
) -> Figure:
    """The idea of a learned ranking: every filter's importance by layer, by norms alone and by Eq. 1, and one cut.

    Importance is that of the filter's unit, in which coupled filters are summed. What stays below the cut has its
    layer at the floor.
    """
    figure, axes = _figure(pd.DataFrame(), caption, 11, 4.6, columns=2)
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
            own = rows[-1][rows[-1].kept == stays]
            shift = np.linspace(-0.3, 0.3, 7)[np.arange(len(own)) % 7]
            ax.scatter(own.layer + shift, own.importance, s=7, color=color, lw=0, label=label)
        ax.axhline(rows[-1].importance[~rows[-1].kept].max(), color=DENSE, lw=1, label="the cut")
        lowest = rows[-1].importance.min()
        ax.set_yscale("log") if lowest > 0 else ax.set_yscale("symlog", linthresh=1, linscale=0.6)
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
    figure, axes = _figure(everything[columns], caption, 12, 3.6 * len(panels) + 0.8, rows=len(panels), columns=2)
    for (left, right), (title, table, dense) in zip(axes, panels, strict=True):
        base = "norm" if "norm" in set(table.method) else table.method[0]
        mean = table[table.method == base].groupby("target").accuracy.mean()
        less = table.assign(accuracy=table.accuracy - table.target.map(mean))
        for ax, part in ((left, table), (right, less)):
            groups = part.groupby(["method", "target"])
            points = pd.DataFrame({"y": 100 * groups.accuracy.mean(), "below": 100 * groups.accuracy.agg(interval)})
            _curves(ax, points.reset_index().assign(x=lambda p: 100 * p.target, above=lambda p: p.below))
        left.axhline(100 * dense["accuracy"], color=DENSE, ls=":", lw=1.2, label="dense")
        left.set(xlabel="FLOPs left (%)", ylabel="test accuracy (%)", title=title)
        right.set(xlabel="FLOPs left (%)", ylabel=f"points over {LABELS[base]}", title=title)
    return _legend(figure)


def networks(graph: Graph, kept: Mapping[tuple[str, float], Sequence[Tensor]], caption: str) -> Figure:
    """Small multiples: filters left in each layer over the dense, a row for each method, a column for each target."""
    methods, targets = (list(dict.fromkeys(column)) for column in zip(*kept, strict=True))
    columns = {f"{method} at {t:.0%}": [int(m.sum()) for m in masks] for (method, t), masks in kept.items()}
    data = pd.DataFrame({"layer": range(1, len(graph.layers) + 1), "dense": graph.widths} | columns)
    figure, axes = _figure(data, caption, 3.3 * len(targets), 1.5 * len(methods) + 0.8, len(methods), len(targets))
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
    figure, (axes,) = _figure(table, caption, 11, 4.4, columns=2)
    for method, part in table.groupby("method"):
        looks = {"color": COLORS[method], "marker": MARKERS[method], "ms": 6}
        axes[0].plot(part.networks, part["one search"], label=f"{LABELS[method]}: one search for all", **looks)
        axes[0].plot(part.networks, part["a search each"], ls="--", label=f"{LABELS[method]}: a search each", **looks)
        axes[1].plot(part.networks, part.ratio, **looks)
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


def tradeoff(
    table: pd.DataFrame, cuts: pd.DataFrame, dense: Mapping[str, float], papers: pd.DataFrame | None, caption: str
) -> Figure:
    """Accuracy over FLOPs, fine-tuned (left) and with BatchNorm recalibrated only (right): means, 95% intervals.

    Args:
        table: columns method, target, trial, flops, accuracy, accuracy_recalibrated.
        cuts: columns method, flops, accuracy_recalibrated of the first trial at many FLOP counts.
        papers: columns network, mflops, accuracy_percent, source; None where the paper used other images.
    """
    figure, axes = _figure(table.drop(columns="widths", errors="ignore"), caption, 11, 5, columns=2)
    groups = table.groupby(["method", "target"])
    titles = {"accuracy": "after fine-tuning", "accuracy_recalibrated": "before: BatchNorm recalibrated only"}
    for ax, (column, title) in zip(axes[0], titles.items(), strict=True):
        points = pd.DataFrame({"x": groups.flops.mean() / 1e6, "y": 100 * groups[column].mean()})
        points["below"] = points["above"] = 100 * groups[column].agg(interval)
        _curves(ax, points.reset_index(), joined=column == "accuracy")
        ax.plot(dense["flops"] / 1e6, 100 * dense["accuracy"], "D", color=DENSE, label="dense")
        ax.set(xlabel="MFLOPs (one image)", ylabel="test accuracy (%)", title=title)
    for method, curve in cuts.groupby("method"):
        axes[0, 1].plot(curve.flops / 1e6, 100 * curve.accuracy_recalibrated, color=COLORS[method], lw=1.5)
    if papers is not None:
        papers = papers[papers.source.str.startswith("paper")]
        looks = {"color": PAPER, "mfc": "white", "ms": 11, "ls": "", "label": "quoted networks (paper)"}
        axes[0, 0].plot(papers.mflops, papers.accuracy_percent, "o", **looks)
        names = [f"{i}  {row.network}: {row.accuracy_percent}" for i, row in enumerate(papers.itertuples(), 1)]
        for i, row in enumerate(papers.itertuples(), 1):
            place = {"ha": "center", "va": "center_baseline", "fontsize": 8}
            axes[0, 0].text(row.mflops, row.accuracy_percent, str(i), **place)
        place = {"ha": "right", "va": "bottom", "fontsize": 9, "color": "#555555", "multialignment": "left"}
        axes[0, 0].text(0.98, 0.03, "\n".join(names), transform=axes[0, 0].transAxes, **place)
    for ax in axes[0]:  # an interval may reach beyond what an accuracy can be
        low, high = ax.get_ylim()
        ax.set_ylim(max(low, 0), min(high, 101))
    return _legend(figure)


def prediction(table: pd.DataFrame, correlations: pd.DataFrame, steps: int, caption: str) -> Figure:
    """Each fitness (column) against the accuracy after the same short fine-tuning, at each target (row)."""
    import seaborn

    rows, columns = correlations.target.nunique(), correlations.fitness.nunique()
    figure, axes = _figure(table, caption, 4 * columns, 3.8 * rows + 0.6, rows, columns)
    looks = {"hue": "source", "palette": COLORS, "style": "source", "markers": MARKERS, "s": 70}
    panels = correlations.sort_values("target", ascending=False, kind="stable").itertuples()
    for ax, panel in zip(axes.flat, panels, strict=True):
        part = table[table.target == panel.target].assign(percent=lambda t: 100 * t.accuracy)
        seaborn.scatterplot(part, x=panel.fitness, y="percent", ax=ax, **looks)
        ax.legend_.remove()  # one for all, above
        ax.errorbar(part[panel.fitness], part.percent, 100 * part.deviation, ls="none", ecolor=PAPER, zorder=0)
        ax.set(xscale="log", xlabel=f"loss, {panel.fitness}", ylabel="")
        title = f"{panel.target:.0%} FLOPs · Spearman ρ = {panel.spearman:.2f}"
        ax.set_title(title.replace("-", "−"), fontsize=11)
    figure.supylabel(f"test accuracy (%), {steps} steps", fontsize=12)
    return _legend(figure)


def tuning(curves: pd.DataFrame, caption: str) -> Figure:
    """Held-out error over epochs of fine-tuning, a panel for each target: means over trials, some with 95% intervals.

    Args:
        curves: columns method, target, trial, epoch (0: as pruned), val_accuracy.
    """
    targets, apart = sorted(curves.target.unique(), reverse=True), -(-curves.epoch.max() // 5)
    if apart > 1:
        caption += f" · intervals: every {apart} epochs"  # more of them hide the curves
    figure, axes = _figure(curves, caption, 4 * len(targets), 4.6, columns=len(targets))
    for ax, target in zip(axes[0], targets, strict=True):
        errors = 100 - 100 * curves[curves.target == target].set_index(["method", "epoch"]).val_accuracy
        groups = errors.groupby(level=[0, 1])
        points = pd.DataFrame({"y": groups.mean(), "below": groups.agg(interval)}).reset_index()
        points["below"] = points.below.where(points.epoch % apart == 0)
        _curves(ax, points.assign(x=points.epoch, above=points.below))
        _log(ax)
        lowest = 0.8 * points.y.clip(lower=0.01).min()  # none may be wrong
        ax.set(xlabel="epochs of fine-tuning", title=f"{target:.0%} FLOPs", ylim=(lowest, 100))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].set(ylabel="held-out error (%)")
    return _legend(figure)


def order(table: pd.DataFrame, caption: str) -> Figure:
    """Which epoch of fine-tuning orders networks as the end does: Spearman's ρ over epochs, a line for each target.

    Args:
        table: columns target, epoch, spearman.
    """
    figure, ((ax,),) = _figure(table, caption, 7, 4.2)
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
    figure, axes = _figure(table, caption, 4.6 * len(questions), 4.6, columns=len(questions))
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
    figure, axes = _figure(table, caption, 5 * len(sizes), 4.6, columns=len(sizes))
    for ax, batch in zip(axes[0], sizes, strict=True):
        part = table[table.batch == batch]
        dense = part[part.method == "dense"].iloc[0]
        ax.plot([0, 1], [0, 1], color=PAPER, ls=":", lw=1.2, label="latency ∝ FLOPs")
        ax.plot(1, 1, "D", color=DENSE, label="dense")
        low, y, high = (part[column] / dense.latency_ms for column in ("low_ms", "latency_ms", "high_ms"))
        _curves(ax, part.assign(x=part.flops / dense.flops, y=y, below=y - low, above=high - y))
        ax.set(xlabel="FLOPs / dense", ylabel="latency / dense", xlim=(0, 1.05), ylim=(0, None))
        ax.set_title(f"batch {batch} (dense: {dense.latency_ms:.1f} ms)")
    return _legend(figure)
