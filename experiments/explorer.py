"""A learned ranking as an instrument: move the FLOP count or tilt a layer, and see what is kept.

`Instrument` is the arithmetic, without a screen; `Controls` are its widgets for JupyterLab. Both need the committed
results only: no images, no training. Images are read when a network is evaluated.
"""

import base64
import io
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

import legr
from experiments.config import Experiment
from experiments.methods import METHODS
from experiments.work import recalibrated_accuracy
from legr.files import UserError
from legr.search import norm_deviations


@dataclass(frozen=True)
class Cut:
    """What a ranking keeps at one FLOP count. `latency_ms` and `accuracy` are read off measured curves, or None."""

    kept: list[Tensor]
    widths: list[int]
    flops: int
    params: int
    latency_ms: float | None
    accuracy: float | None


class Instrument:
    """The dense network, one method's ranking and the measured curves of an experiment."""

    def __init__(self, exp: Experiment, method: str = "legr"):
        self.exp, self.method, self.graph = exp, method, exp.graph
        if method not in exp.settings.rankings:
            raise UserError(f"method is {method!r}; it must be one of {', '.join(exp.settings.rankings)}")
        self.ranking = exp.ranking(method, 0)
        self.deviations = norm_deviations(exp.norms)
        self.dense_flops = self.graph.flops()
        try:
            table = pd.read_csv(exp.path("compare/tradeoff.csv"))
            times = pd.read_csv(exp.path("compare/latency.csv"))
        except FileNotFoundError as error:
            raise UserError(
                f"results file {error.filename} does not exist; run the pipeline (dvc repro) first"
            ) from None
        accuracy = table[table.method == method].groupby("flops").accuracy.mean()
        accuracy.loc[self.dense_flops] = exp.dense["accuracy"]
        self.accuracy, self.batch = accuracy.sort_index(), int(times.batch.max())
        times = times[times.method.isin([method, "dense"]) & (times.batch == self.batch)]
        self.latency = times.groupby("flops").latency_ms.mean().sort_index()

    def tilted(self, layer: int, scale: float, shift: float) -> legr.Ranking:
        """The ranking with α of one layer (counted from 0) times `scale` and its κ moved by `shift` deviations s."""
        alpha, kappa = list(self.ranking.scale), list(self.ranking.shift)
        alpha[layer] *= scale
        kappa[layer] += shift * float(self.deviations[layer])
        return legr.Ranking(tuple(alpha), tuple(kappa))

    def cut(self, target: float, ranking: legr.Ranking | None = None) -> Cut:
        """Cut to the fraction `target`. A ranking other than the learned one has no measured accuracy."""
        scores = (ranking or self.ranking).scores(self.exp.norms)
        kept = legr.select(self.graph, scores, target, floor=self.exp.settings.floor)
        flops, own = self.graph.flops(kept), ranking is None or ranking == self.ranking
        widths, params = [int(mask.sum()) for mask in kept], self.graph.params(kept)
        accuracy = _read_off(self.accuracy, flops) if own else None
        return Cut(kept, widths, flops, params, _read_off(self.latency, flops), accuracy)

    def evaluate(self, cut: Cut) -> float:
        """Test accuracy of the network with BatchNorm recalibrated (reads the images)."""
        return recalibrated_accuracy(self.exp, cut.kept, self.exp.data.test.to(self.exp.compute.device))


def _read_off(curve: pd.Series, flops: int) -> float | None:
    """Between measured points a straight line; outside of them nothing."""
    if not curve.index[0] <= flops <= curve.index[-1]:
        return None
    return float(np.interp(flops, curve.index.to_numpy(float), curve.to_numpy()))


def draw(instrument: Instrument, cut: Cut, learned: Cut, title: str) -> bytes:
    """Bars of the widths per layer, with marks where the learned ranking's are, as a PNG."""
    figure = Figure(figsize=(10, 3.1), dpi=80, layout="none")
    ax, widths = figure.add_axes((0.065, 0.2, 0.925, 0.65)), instrument.graph.widths
    layers = range(1, len(widths) + 1)
    ax.bar(layers, widths, color="#E3E3E3", width=0.9, label="dense")
    ax.bar(layers, cut.widths, color=METHODS[instrument.method].color, width=0.9, label="kept")
    ax.plot(layers, learned.widths, "_", color="#000000", ms=6, mew=1.5, label="kept by the learned ranking")
    ax.set(xlabel="prunable layer, in execution order", ylabel="filters", xlim=(0.3, len(widths) + 0.7))
    ax.set_title(title, loc="left", fontsize=11)
    ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8)
    ax.grid(visible=False, axis="x")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def describe(instrument: Instrument, cut: Cut) -> pd.DataFrame:
    """One row of numbers about a cut; a dash where nothing was measured."""
    row = {
        "MFLOPs": f"{cut.flops / 1e6:.1f}",
        "FLOPs / dense": f"{cut.flops / instrument.dense_flops:.1%}",
        "parameters": f"{cut.params:,}",
        f"latency, batch {instrument.batch} (interpolated)": f"{cut.latency_ms:.1f} ms" if cut.latency_ms else "–",
        "accuracy, fine-tuned (interpolated)": f"{cut.accuracy:.2%}" if cut.accuracy else "–",
    }
    return pd.DataFrame([row], index=[instrument.method])


class Controls:
    """Sliders and a button over an `Instrument`; display `Controls(...)` as the last line of a cell."""

    def __init__(self, instrument: Instrument, target: float = 0.47):
        self.instrument = instrument
        long, wide = widgets.Layout(width="98%"), {"description_width": "9em"}
        slider = {"min": 0.1, "max": 1.0, "step": 0.01, "readout_format": ".2f", "layout": long, "style": wide}
        self.target = widgets.FloatSlider(target, description="FLOPs / dense", **slider)
        names = [(f"{i + 1}: {layer.name} ({layer.width})", i) for i, layer in enumerate(instrument.graph.layers)]
        self.layer = widgets.Dropdown(options=names, description="tilt layer", style=wide)
        self.scale = widgets.FloatLogSlider(1.0, min=-1, max=1, step=0.05, description="its α ×", style=wide)
        self.shift = widgets.FloatSlider(0.0, min=-3, max=3, step=0.1, description="its κ + s ×", style=wide)
        self.button = widgets.Button(description="Prune and evaluate", layout=widgets.Layout(width="14em"))
        self.image, self.numbers = widgets.Image(format="png", layout=long), widgets.HTML()
        self.result = widgets.HTML()
        for control in (self.target, self.layer, self.scale, self.shift):
            control.observe(self._moved, "value")
        self.button.on_click(self._evaluate)
        tilts, actions = widgets.HBox([self.layer, self.scale, self.shift]), widgets.HBox([self.button, self.result])
        self.box = widgets.VBox([self.target, tilts, self.image, self.numbers, actions])
        self.update()

    @property
    def ranking(self) -> legr.Ranking:
        return self.instrument.tilted(self.layer.value, self.scale.value, self.shift.value)

    def update(self) -> None:
        """Redraw for the controls' values."""
        try:
            cut = self.instrument.cut(self.target.value, self.ranking)
            learned = self.instrument.cut(self.target.value)
        except UserError as error:
            self.numbers.value, self.button.disabled = f"<b>{error}</b>", True
            return
        self.cut, self.button.disabled = cut, False
        changed = sum(a != b for a, b in zip(cut.widths, learned.widths, strict=True))
        title = f"{self.instrument.method} at {cut.flops / self.instrument.dense_flops:.1%} of the FLOPs"
        title += f" · {changed} layers differ from the learned ranking" if changed else ""
        self.image.value = draw(self.instrument, cut, learned, title)
        row = describe(self.instrument, cut).iloc[0]
        self.numbers.value = " · ".join(f"{name}: <b>{value}</b>" for name, value in row.items())

    def _moved(self, _) -> None:
        self.result.value = ""
        self.update()

    def _evaluate(self, _) -> None:
        self.result.value = "pruning and evaluating …"
        try:
            accuracy = self.instrument.evaluate(self.cut)
            self.result.value = f"test accuracy, BatchNorm recalibrated, not fine-tuned: <b>{accuracy:.2%}</b>"
        except UserError as error:
            self.result.value = str(error)

    def _repr_mimebundle_(self, **options) -> dict:
        """The widgets where they can live, and a picture where they can't (a rendered or executed notebook)."""
        bundle = dict(self.box._repr_mimebundle_(**options) or {})
        bundle["text/plain"] = f"{self.instrument.method} at {self.target.value} of the FLOPs"
        bundle["image/png"] = base64.b64encode(self.image.value).decode()
        return bundle
