"""All figures: one style, one colour per method, each with a line that says which run it shows."""

import base64
import itertools
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

from experiments.latency import KINDS
from experiments.paper import Printed
from legr.files import atomic, write_text
from legr.graph import Graph
from legr.ranking import Ranking

# Okabe and Ito's palette: distinct for colour-blind readers. Paper numbers are grey.
COLORS = {
    "legr": "#0072B2",
    "legr-tau0": "#56B4E9",
    "norm": "#D55E00",
    "uniform": "#009E73",
    "dense": "#000000",
    "paper": "#7F7F7F",
}
MARKERS = {"legr": "o", "legr-tau0": "v", "norm": "s", "uniform": "^", "dense": "D", "paper": "x"}
LABELS = {
    "legr": "LeGR (recalibrated fitness)",
    "legr-tau0": "LeGR (paper's fitness, τ = 0)",
    "norm": "norm-only",
    "uniform": "uniform",
}
FITNESS = {
    "loss": "loss as cut (paper, τ = 0)",
    "recalibrated": "loss, BatchNorm recalibrated",
    "steps": "loss after τ steps",
}
FITTED = "loss, BatchNorm recalibrated, on images that the dense network was trained on"

# matplotlib's copy of seaborn's style: importing seaborn itself takes seconds, in every stage.
plt.style.use(["seaborn-v0_8-whitegrid", "seaborn-v0_8-notebook"])
plt.rcParams |= {
    "font.sans-serif": ["DejaVu Sans"],  # matplotlib brings it, and it has every sign used
    "font.size": 13.8, "axes.labelsize": 13.8, "axes.titlesize": 13.8,  # readable at half width
    "xtick.labelsize": 12.65, "ytick.labelsize": 12.65, "legend.fontsize": 12.65,
    "figure.dpi": 100, "savefig.dpi": 200, "figure.constrained_layout.use": True, "svg.hashsalt": "legr",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.facecolor": "white",
}  # fmt: skip


def save(figure: Figure, path: str | Path) -> Figure:
    """Write `path`.svg, `path`.png and the numbers drawn as `path`.csv; returns the figure for display."""
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {})):
        with atomic(f"{path}{suffix}") as temporary:
            figure.savefig(temporary, format=suffix[1:], metadata=metadata)
    write_text(f"{path}.csv", figure.data.to_csv(index=False, float_format="%.6g"))
    plt.close(figure)
    return figure


def _figure(data: pd.DataFrame, caption: str, columns: int = 1, width: float = 7.0, height: float = 4.2, rows: int = 1):
    """Axes [rows, columns] on a figure that carries the numbers it shows (`.data`) and says which run they are of."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    figure.data = data
    figure.supxlabel("\n".join(wrap(caption, 14 * width)), fontsize=9, color="#555555")
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
    figure, axes = _figure(history.drop(columns="seconds", errors="ignore"), caption, 2, 9, 3.6)
    left, right = axes[0]
    marker = "o" if len(history) < 10 else None
    for column, color, label in (
        ("train_accuracy", "#7F7F7F", "training images (augmented)"),
        ("val_accuracy", COLORS["dense"], "held-out images"),
    ):
        if column in history:
            left.plot(history.epoch, 100 * history[column], color=color, label=label, marker=marker)
    left.set(xlabel="epoch", ylabel="accuracy (%)")
    left.legend()
    if "lr" in history:
        right.plot(history.epoch, history.lr, color="#7F7F7F", marker=marker)
    right.set(xlabel="epoch", ylabel="learning rate")
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def search(history: pd.DataFrame, method: str, population: int, caption: str, restart: int | None = None) -> Figure:
    """Every candidate's loss and the best so far over evaluations; norm-only is marked.

    Args:
        restart: after how many evaluations the search went on with another yardstick.
    """
    figure, axes = _figure(history[["evaluation", "loss", "best"]], caption)
    ax = axes[0, 0]
    ax.scatter(history.evaluation, history.loss, s=10, color=COLORS[method], alpha=0.4, label="candidate", linewidths=0)
    for part, label in ((history[:restart], "best so far"), (history[restart or len(history) :], None)):
        ax.plot(part.evaluation, part.best, color=COLORS[method], lw=2, label=label)
    if restart:
        ax.axvline(restart + 0.5, color=COLORS["paper"], ls=":", lw=1.5, label="searched on, at more FLOP counts")
    norm = history.loss[population - 1]
    ax.axhline(norm, color=COLORS["norm"], ls="--", lw=1.2, label=f"norm-only ({norm:.2f})")
    ax.axvspan(0.5, population + 0.5, color="#000000", alpha=0.05, lw=0)
    ax.set(
        xlabel="evaluation (shaded: initial population)",
        ylabel="loss on held-out images",
        xlim=(0.5, len(history) + 0.5),
    )
    _losses(ax, "y", history.loss)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2 if restart else 3)  # points are everywhere inside
    return figure


def search_times(curves: pd.DataFrame, caption: str) -> Figure:
    """The best loss so far over the time that each procedure has searched; one panel per seed.

    Args:
        curves: columns procedure, seed, seconds, best.
    """
    seeds = sorted(curves.seed.unique())
    figure, axes = _figure(curves, caption, len(seeds), 4 * len(seeds), 4.2)
    shades = ("#7F7F7F", COLORS["legr"], COLORS["norm"])
    colors = dict(zip(curves.procedure.unique(), shades, strict=True))
    for ax, seed in zip(axes[0], seeds, strict=True):
        part = curves[curves.seed == seed]
        for procedure, line in part.groupby("procedure", sort=False):
            ax.step(line.seconds, line.best, where="post", color=colors[procedure], lw=2, label=procedure)
            ax.plot(line.seconds.iloc[-1:], line.best.iloc[-1:], "o", ms=6, color=colors[procedure])  # its end
        _losses(ax, "y", curves.best)
        ax.set(title=f"seed {seed}", xlabel="seconds since the search began", xlim=(0, curves.seconds.max() * 1.05))
    axes[0, 0].set_ylabel("best loss so far")
    axes[0, -1].legend()
    return figure


def affine_maps(ranking: Ranking, deviations: Sequence[float], method: str, caption: str) -> Figure:
    """The learned α (log scale) and κ (in deviations of the layer's norms) of each layer."""
    layers = range(1, len(ranking.scale) + 1)
    shift = [k / s for k, s in zip(ranking.shift, deviations, strict=True)]
    data = pd.DataFrame({"layer": layers, "scale": ranking.scale, "shift": ranking.shift, "shift_over_s": shift})
    figure, axes = _figure(data, caption, 1, 9, 5, rows=2)
    top, bottom = axes[:, 0]
    top.vlines(layers, 1, ranking.scale, color=COLORS[method])
    top.plot(layers, ranking.scale, "o", ms=4, color=COLORS[method])
    top.axhline(1, color=COLORS["norm"], ls="--", lw=1, label="norm-only (α = 1, κ = 0)")
    top.set(ylabel="scale α")
    _losses(top, "y", ranking.scale)
    figure.legend(*top.get_legend_handles_labels(), loc="outside upper right")
    bottom.vlines(layers, 0, shift, color=COLORS[method])
    bottom.plot(layers, shift, "o", ms=4, color=COLORS[method])
    bottom.axhline(0, color=COLORS["norm"], ls="--", lw=1)
    bottom.set(xlabel="prunable layer, in execution order", ylabel="shift κ / s")
    return figure


def widths(graph: Graph, kept: Mapping[str, Sequence[Tensor]], caption: str) -> Figure:
    """Filters left in each layer, one panel per method, over the dense network's."""
    layers = range(1, len(graph.layers) + 1)
    data = pd.DataFrame({"layer": layers, "name": [layer.name for layer in graph.layers], "dense": graph.widths})
    data = data.assign(**{method: [int(m.sum()) for m in masks] for method, masks in kept.items()})
    figure, axes = _figure(data, caption, 1, 9, 1.9 * len(kept) + 0.6, rows=len(kept))
    for ax, (method, masks) in zip(axes[:, 0], kept.items(), strict=True):
        ax.bar(layers, graph.widths, color="#E3E3E3", width=0.9, label="dense")
        ax.bar(layers, data[method], color=COLORS[method], width=0.9, label=LABELS[method])
        ax.set(ylabel="filters", xlim=(0.3, len(graph.layers) + 0.7))
        ax.grid(visible=False, axis="x")
        ax.set_title(f"{LABELS[method]} · {graph.flops(masks) / 1e6:.1f} MFLOPs", loc="left", fontsize=11)
    axes[-1, 0].set_xlabel("prunable layer, in execution order")
    return figure


def search_movie(
    graph: Graph,
    tried: Sequence[Sequence[int]],
    history: pd.DataFrame,
    method: str,
    path: str | Path,
    frames: int = 80,
    restart: int = 0,
) -> str:
    """The search as a GIF: widths of the candidate on trial over those of the best so far, and its loss.

    Args:
        tried: widths [evaluations, layers] of every candidate.
        history: the rows of the search, one for each of `tried`.
        path: without its suffix.
        frames: at most so many evaluations are shown, evenly chosen, the last one included.
        restart: after how many evaluations the search went on with another yardstick.

    Returns:
        An HTML image element that holds the GIF.
    """
    figure, axes = plt.subplots(2, 1, figsize=(8, 4.4), dpi=72, height_ratios=(2, 1))
    top, bottom = axes
    layers = range(1, len(graph.layers) + 1)
    top.bar(layers, graph.widths, color="#E3E3E3", width=0.9, label="dense")
    best_bars = top.bar(layers, graph.widths, color=COLORS[method], width=0.9, label="best so far")
    (now,) = top.plot(layers, graph.widths, "_", color="#000000", ms=6, mew=1.5, label="on trial")
    top.set(xlabel="prunable layer, in execution order", ylabel="filters", xlim=(0.3, len(graph.layers) + 0.7))
    top.grid(visible=False, axis="x")
    top.legend(fontsize=8, loc="upper left", ncols=3)
    title = top.set_title(" ", loc="left", fontsize=10)
    bottom.plot(history.evaluation, history.loss, ".", color=COLORS[method], alpha=0.3, ms=4, mew=0)
    bottom.plot(history.evaluation, history.best, color=COLORS[method], lw=1.5)
    (dot,) = bottom.plot([], [], "o", color="#000000", ms=5)
    bottom.set(xlabel="evaluation", ylabel="loss", xlim=(0.5, len(history) + 0.5))
    _losses(bottom, "y", history.loss)
    figure.canvas.draw()
    figure.set_layout_engine("none")  # the layout is settled; solving it again for every frame is slow

    def draw(i: int) -> None:
        first = restart if i >= restart else 0
        row, best = history.iloc[i], first + int(history.loss[first : i + 1].argmin())
        now.set_ydata(tried[i])
        dot.set_data([row.evaluation], [row.loss])
        for bar, width in zip(best_bars, tried[best], strict=True):
            bar.set_height(width)
        title.set_text(f"{LABELS[method]} · evaluation {int(row.evaluation)} · best loss {row.best:.3f}")

    last = len(history) - 1
    images = []
    for i in sorted({round(last * k / (frames - 1)) for k in range(frames)}):
        draw(i)
        figure.canvas.draw()
        images.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(64))
    plt.close(figure)
    with atomic(f"{path}.gif") as temporary:
        pauses = [120] * (len(images) - 1) + [2500]  # milliseconds
        images[0].save(temporary, "GIF", save_all=True, append_images=images[1:], duration=pauses, loop=0)
        content = temporary.read_bytes()
    return f'<img alt="the search, animated" src="data:image/gif;base64,{base64.b64encode(content).decode()}">'


def tradeoff(table: pd.DataFrame, dense: Mapping[str, float], printed: Printed, data: str, caption: str) -> Figure:
    """Accuracy over FLOPs: fine-tuned (left) and before it, as cut and with BatchNorm recalibrated (middle).

    Means and ranges over seeds.

    The paper's points are drawn with ours where its networks saw the same `data`, else in a panel of their
    own; digits have neither.
    """
    together, apart = printed.comparable(data), data in ("imagenette", "folder")
    shown = table[["method", "target", "flops", "accuracy_before", "accuracy_recalibrated", "accuracy", "seed"]]
    points = [{"method": "dense", "target": 1.0, "flops": dense["flops"], "accuracy": dense["accuracy"]}]
    if together or apart:
        points += [
            {"method": f"paper: {row.network}", "flops": 1e6 * row.mflops, "accuracy": row.accuracy_percent / 100}
            for row in printed.table.itertuples()
        ]
    numbers = pd.concat([shown, pd.DataFrame(points)])
    figure, axes = _figure(numbers, caption, 2 + apart, 10 + 4 * apart, 4.8)
    before = {"-": ("accuracy_before", "as cut"), ":": ("accuracy_recalibrated", "BatchNorm recalibrated")}
    lines = [(axes[0, 0], "accuracy", "-"), *((axes[0, 1], column, line) for line, (column, _) in before.items())]
    for ax, column, line in lines:
        # Each curve is thinner than those under it: where they coincide, all show.
        for rim, method in zip((5, 3, 1.5, 0), [m for m in LABELS if m in set(table.method)], strict=False):
            rows = (
                table[table.method == method]
                .groupby("target")
                .agg(flops=("flops", "mean"), mean=(column, "mean"), low=(column, "min"), high=(column, "max"))
            )
            rows = rows.assign(below=rows["mean"] - rows.low, above=rows.high - rows["mean"]).sort_values("flops")
            ax.errorbar(
                rows.flops / 1e6, 100 * rows["mean"], 100 * rows[["below", "above"]].to_numpy().T, ls=line,
                color=COLORS[method], marker=MARKERS[method], label=LABELS[method], lw=2 + rim / 2, ms=6 + rim,
                capsize=3,
            )  # fmt: skip
    for ax, title in zip(axes[0], ("after fine-tuning", "before fine-tuning"), strict=False):
        ax.plot(dense["flops"] / 1e6, 100 * dense["accuracy"], MARKERS["dense"], color=COLORS["dense"], label="dense")
        ax.set(xlabel="MFLOPs (one image)", ylabel="test accuracy (%)", title=title)
    if together:
        _paper_points(axes[0, 0], printed)
    if apart:
        _paper_points(axes[0, 2], printed)
        axes[0, 2].set(
            xlabel="MFLOPs (one image)",
            ylabel="accuracy (%)",
            title=f"paper, not comparable:\n{printed.protocol}",
        )
        axes[0, 2].title.set_fontsize(11)
        axes[0, 2].margins(0.25)
    axes[0, 0].legend(fontsize=8, loc="lower right" if together else "best")
    keys = [
        plt.Line2D([], [], ls=line, lw=2, color=COLORS["paper"], label=label) for line, (_, label) in before.items()
    ]
    axes[0, 1].legend(handles=keys, fontsize=8)
    return figure


def _paper_points(ax: Axes, printed: Printed) -> None:
    table = printed.table
    label = f"paper's {printed.source}"
    ax.plot(
        table.mflops, table.accuracy_percent, MARKERS["paper"], color=COLORS["paper"], label=label, ls="none", mew=2
    )
    for row in table.itertuples():
        ours = row.network.startswith(("LeGR", "dense"))
        if ours or printed.model == "mobilenet_v2":
            ax.annotate(
                f"{row.network} (paper)",
                (row.mflops, row.accuracy_percent),
                (4, 5) if ours else (4, -13),
                textcoords="offset points",
                fontsize=7,
                color="#555555",
                ha="center" if "70%" in row.network or printed.model == "mobilenet_v2" else "right",
            )


def prediction(table: pd.DataFrame, correlations: pd.DataFrame, steps: int, caption: str) -> Figure:
    """Each fitness against the accuracy after the same short fine-tuning: a point per ranking, deviation over seeds."""
    import seaborn as sns

    sources = {"legr": "candidates of the recalibrated search", "legr-tau0": "candidates of the τ = 0 search"}
    sources["norm"] = LABELS["norm"]
    figure, axes = _figure(table, caption, len(FITNESS), 11, 4.6)
    for ax, (kind, label) in zip(axes[0], FITNESS.items(), strict=True):
        sns.scatterplot(
            table.assign(percent=100 * table.accuracy), x=kind, y="percent", ax=ax, legend=False, s=45,
            hue="source", palette=COLORS, style="source", markers={s: MARKERS[s] for s in sources},
        )  # fmt: skip
        deviation = 100 * table.deviation.fillna(0)
        ax.errorbar(table[kind], 100 * table.accuracy, deviation, ls="none", ecolor="#7F7F7F", elinewidth=0.8, zorder=0)
        rho = correlations.set_index("fitness").spearman[kind]
        ax.set(
            xlabel=label, title="Spearman ρ undefined" if pd.isna(rho) else f"Spearman ρ = {rho:.2f}".replace("-", "−")
        )
        _losses(ax, "x", table[kind])
        ax.set_ylabel("")
    axes[0, 0].set_ylabel(f"test accuracy (%) after {steps} steps")
    shown = [s for s in sources if s in set(table.source)]
    marks = [plt.Line2D([], [], color=COLORS[s], marker=MARKERS[s], ls="none") for s in shown]
    figure.legend(marks, [sources[s] for s in shown], loc="outside upper center", ncols=3, fontsize=10)
    return figure


def latency(table: pd.DataFrame, caption: str) -> Figure:
    """Latency over FLOPs, both relative to the dense network; one panel per batch size."""
    sizes = sorted(table.batch.unique())
    figure, axes = _figure(table, caption, len(sizes), 5 * len(sizes), 4.4)
    for ax, batch in zip(axes[0], sizes, strict=True):
        part = table[table.batch == batch]
        dense = part[part.method == "dense"].iloc[0]
        ax.plot([0, 1], [0, 1], color=COLORS["paper"], ls=":", lw=1.2, label="latency ∝ FLOPs")
        for method in [m for m in (*LABELS, "dense") if m in set(part.method)]:
            rows = part[part.method == method].sort_values("flops")
            ax.plot(
                rows.flops / dense.flops,
                rows.latency_ms / dense.latency_ms,
                color=COLORS[method],
                marker=MARKERS[method],
                label=LABELS.get(method, method),
                ls="-" if len(rows) > 1 else "none",
            )
        ax.set(
            xlabel="FLOPs / dense",
            ylabel="latency / dense",
            title=f"batch {batch} (dense: {dense.latency_ms:.1f} ms)",
            xlim=(0, 1.05),
            ylim=(0, None),
        )
    axes[0, 0].legend(fontsize=8)
    return figure


def latency_rounded(table: pd.DataFrame, caption: str) -> Figure:
    """Latency over FLOPs of networks whose widths are multiples of `round_to`; a column what ran them.

    Args:
        table: columns runtime, threads, method, round_to, batch, flops_ratio, latency_ratio, latency_ms; a row of the
            figure for each pair of batch and threads.
    """
    runtimes = table.runtime.unique()
    sizes = list(table[["batch", "threads"]].drop_duplicates().itertuples(index=False, name=None))
    figure, axes = _figure(table, caption, len(runtimes), 3.6 * len(runtimes), 3.7 * len(sizes), len(sizes))
    markers = dict(zip(sorted(table.round_to.unique()), "osD^v", strict=False))
    for (i, (batch, threads)), (j, runtime) in itertools.product(enumerate(sizes), enumerate(runtimes)):
        ax = axes[i, j]
        part = table[(table.runtime == runtime) & (table.batch == batch) & (table.threads == threads)]
        ax.plot([0, 1], [0, 1], color=COLORS["paper"], ls=":", lw=1.2, label="latency ∝ FLOPs")
        for (method, step), rows in part[part.method != "dense"].groupby(["method", "round_to"]):
            label = f"{LABELS[method]}, widths of {step}" if step > 1 else LABELS[method]
            style = {"color": COLORS[method], "marker": markers[step], "alpha": 1 if step == 1 else 0.55}
            ax.plot(rows.flops_ratio, rows.latency_ratio, label=label, ls="-" if step == 1 else ":", ms=5, **style)
        dense = part[part.method == "dense"].latency_ms.iloc[0]
        cores = "1 thread" if threads == 1 else f"{threads} threads"
        ax.set_title(f"{runtime}\nbatch {batch}, {cores}\ndense: {dense:.1f} ms", fontsize=11)
        ax.set(xlim=(0, 1.05), ylim=(0, None))
        ax.set(xlabel="FLOPs / dense" if i == len(sizes) - 1 else "", ylabel="" if j else "latency / dense")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8)
    return figure


def latency_parts(layers: pd.DataFrame, ratios: Mapping[str, float], batch: int, caption: str) -> Figure:
    """Where the time goes: one bar a network, by kind of layer, over the dense network's time; a mark at its FLOPs.

    Args:
        layers: the rows of `latency.by_layer`.
        ratios: FLOPs of each network over the dense network's, in the order of the bars.
    """
    parts = layers.groupby(["network", "kind"]).ms.sum().unstack(fill_value=0.0).reindex(list(ratios))
    parts = parts[[kind for kind in KINDS if kind in parts]]
    whole = parts.loc["dense"].sum()
    figure, axes = _figure(
        parts.assign(flops_ratio=pd.Series(ratios)).reset_index(), caption, 1, 9, 0.38 * len(parts) + 2
    )
    ax = axes[0, 0]
    palette = dict(zip(KINDS, ("#0072B2", "#56B4E9", "#332288", "#E69F00", "#F0E442", "#BBBBBB"), strict=True))
    left = np.zeros(len(parts))
    for kind in parts:
        ax.barh(parts.index, parts[kind] / whole, left=left, color=palette[kind], label=kind, height=0.7)
        left += (parts[kind] / whole).to_numpy()
    ax.plot(list(ratios.values()), range(len(parts)), "|", color="#000000", ms=14, mew=2, label="FLOPs / dense")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    ax.set(xlabel=f"time / dense, batch {batch} (dense: {whole:.1f} ms, timed layer by layer)")
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=9)
    return figure
