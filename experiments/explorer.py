"""A learned ranking as an instrument for JupyterLab: move the FLOP count or tilt a layer, and see what is kept.

It needs the committed results only: no images, no training. Images are read when a network is evaluated.
"""

import base64
import io
from typing import NamedTuple

import ipywidgets as widgets
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from torch import Tensor

import legr
from experiments.config import Experiment
from experiments.figures import LABELS, bars
from experiments.work import recalibrated_accuracy
from legr.files import UserError
from legr.search import norm_deviations

ACCURACY = "accuracy, fine-tuned (%)"


class Cut(NamedTuple):
    """What a ranking keeps at one FLOP count: masks and widths per layer, and numbers for display."""

    kept: list[Tensor]
    widths: list[int]
    numbers: dict[str, float]  # latency and accuracy lie between measured ones; NaN where nothing was measured


class Explorer(widgets.VBox):
    """Sliders and a button over one method's ranking; display it as the last line of a cell. `cut` is the arithmetic.

    Raises:
        UserError: `method` learns no ranking here, or results are missing.
    """

    def __init__(self, exp: Experiment, method: str = "legr", target: float = 0.47):
        if method not in exp.settings.rankings:
            raise UserError(f"method is {method!r}; it must be one of {', '.join(exp.settings.rankings)}")
        self.exp, self.method, self.graph, self.learned = exp, method, exp.graph, exp.ranking(method, 0)
        try:
            table, times = (pd.read_csv(exp.path(f"compare/{name}.csv")) for name in ("tradeoff", "latency"))
        except FileNotFoundError as error:
            raise UserError(f"results file {error.filename} does not exist; run the pipeline (dvc repro)") from None
        batch = times.batch.max()
        times = times[times.method.isin([method, "dense"]) & (times.batch == batch)].groupby("flops").latency_ms.mean()
        accuracy = 100 * table[table.method == method].groupby("flops").accuracy.mean()
        accuracy[self.graph.flops()] = 100 * exp.dense["accuracy"]
        self.measured = {f"latency, batch {batch} (ms)": times, ACCURACY: accuracy}

        wide = widgets.Layout(width="98%")
        layers = [(f"{i}: {layer.name} ({layer.width})", i - 1) for i, layer in enumerate(self.graph.layers, 1)]
        self.target = widgets.FloatSlider(target, min=0.1, max=1, step=0.01, description="FLOPs left", layout=wide)
        self.layer = widgets.Dropdown(options=layers, description="tilt layer")
        self.scale = widgets.FloatLogSlider(1, min=-1, max=1, step=0.05, description="its α ×")
        self.shift = widgets.FloatSlider(0, min=-3, max=3, step=0.1, description="its κ + s ×")
        self.image, self.numbers = widgets.Image(layout=wide), widgets.HTML()
        self.button, self.result = widgets.Button(description="Prune and evaluate"), widgets.HTML()
        tilt, actions = (self.layer, self.scale, self.shift), (self.button, self.result)
        super().__init__([self.target, widgets.HBox(tilt), self.image, self.numbers, widgets.HBox(actions)])
        for control in (self.target, *tilt):
            control.observe(self._show, "value")
        self.button.on_click(self._evaluate)
        self._show()

    def cut(self, target: float, layer: int = 0, scale: float = 1.0, shift: float = 0.0) -> Cut:
        """Cut to the fraction `target` of the FLOPs by the learned ranking, tilted or as it is.

        Args:
            layer: counted from 0: its α is multiplied by `scale`, its κ moved by `shift` deviations of its norms.

        Raises:
            UserError: so few FLOPs can't be reached.
        """
        norms, alpha, kappa = self.exp.norms, list(self.learned.scale), list(self.learned.shift)
        alpha[layer] *= scale
        kappa[layer] += shift * norm_deviations(norms)[layer]
        scores = legr.Ranking(tuple(alpha), tuple(kappa)).scores(norms)
        kept = legr.select(self.graph, scores, target, floor=self.exp.settings.floor)
        flops = self.graph.flops(kept)
        numbers = {"MFLOPs": flops / 1e6, "FLOPs / dense (%)": 100 * flops / self.graph.flops()}
        numbers["parameters (thousands)"] = self.graph.params(kept) / 1e3
        for name, curve in self.measured.items():
            numbers[name] = np.interp(flops, curve.index, curve, left=np.nan, right=np.nan)
        if (scale, shift) != (1, 0):
            numbers[ACCURACY] = np.nan  # only networks of the learned ranking were trained
        return Cut(kept, [int(mask.sum()) for mask in kept], numbers)

    def _show(self, _=None) -> None:
        """Cut and draw for the controls' values."""
        self.result.value = ""
        try:
            learned = self.cut(self.target.value)
            self.shown = self.cut(self.target.value, self.layer.value, self.scale.value, self.shift.value)
        except UserError as error:
            self.numbers.value, self.button.disabled = f"<b>{error}</b>", True
            return
        figure = Figure(figsize=(10, 3.1), dpi=80)
        ax = figure.subplots()
        bars(ax, self.graph.widths, self.shown.widths, self.method)
        ax.plot(range(1, len(learned.widths) + 1), learned.widths, "_k", mew=1.5, label="kept by the learned ranking")
        ax.set_title(f"{LABELS[self.method]} at {self.target.value:.0%}", loc="left")
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=8)
        picture = io.BytesIO()
        figure.savefig(picture, dpi="figure")
        self.image.value, self.button.disabled = picture.getvalue(), False
        numbers = pd.Series(self.shown.numbers).map("{:,.2f}".format).replace("nan", "–")
        self.numbers.value = " · ".join(f"{name}: <b>{number}</b>" for name, number in numbers.items())

    def _evaluate(self, _) -> None:
        """Test accuracy of the network that is shown, with BatchNorm recalibrated (reads the images)."""
        self.result.value = "pruning and evaluating …"
        try:
            test = self.exp.data.test.to(self.exp.compute.device)
            accuracy = recalibrated_accuracy(self.exp, self.shown.kept, test)
            self.result.value = f"test accuracy, BatchNorm recalibrated, not fine-tuned: <b>{accuracy:.2%}</b>"
        except UserError as error:
            self.result.value = str(error)

    def _repr_mimebundle_(self, **options) -> dict:
        """The widgets where they can live, and a picture where they can't (a rendered or executed notebook)."""
        return super()._repr_mimebundle_(**options) | {"image/png": base64.b64encode(self.image.value).decode()}
