"""A learned ranking as an instrument: move the FLOP count or tilt a layer, and see what is kept.

`Instrument` is the arithmetic, without a screen; `controls` are its widgets for JupyterLab. Both
need the committed results only: no images, no training. Images are read when a network is evaluated.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import ipywidgets as widgets
import numpy as np
import pandas as pd
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

import legr
from experiments.config import Workspace
from experiments.figures import COLORS
from legr import data, models, training
from legr.errors import UserError
from legr.ranking import norm_deviations


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
    """The dense network, its learned ranking and the measured curves of one experiment.

    Args:
        space: the experiment whose results are read.
        method: a learned ranking of it, such as `legr`.
    """

    def __init__(self, space: Workspace, method: str = "legr"):
        self.space, self.method = space, method
        settings = space.settings
        if method not in settings.search.rankings:
            raise UserError(f"method is {method!r}; it must be one of {', '.join(settings.search.rankings)}")
        self.ranking = legr.Ranking.load(space.ranking(method))
        side = settings.data.resolution
        self.model = _dense(space)
        self.graph = legr.trace(self.model, torch.zeros(1, 3, side, side))
        self.norms = legr.filter_norms(self.model, self.graph)
        self.deviations = norm_deviations(self.norms)
        self.dense_flops = self.graph.flops()
        self.dense_params = sum(p.numel() for p in self.model.parameters())
        self.accuracy, self.latency, self.batch = _curves(space, method, self.dense_flops)

    def tilted(self, layer: int, scale: float, shift: float) -> legr.Ranking:
        """The ranking with α of one layer (counted from 0) times `scale` and its κ moved by `shift` deviations s."""
        alpha, kappa = list(self.ranking.scale), list(self.ranking.shift)
        alpha[layer] *= scale
        kappa[layer] += shift * float(self.deviations[layer])
        return legr.Ranking(tuple(alpha), tuple(kappa))

    def cut(self, flops: float, ranking: legr.Ranking | None = None) -> Cut:
        """Cut to the fraction `flops`. A ranking other than the learned one has no measured accuracy."""
        kept = legr.select(self.graph, (ranking or self.ranking).scores(self.norms), flops)
        count = self.graph.flops(kept)
        own = ranking is None or ranking == self.ranking
        return Cut(
            kept,
            [int(mask.sum()) for mask in kept],
            count,
            self.params(kept),
            _read_off(self.latency, count),
            _read_off(self.accuracy, count) if own else None,
        )

    def params(self, kept: Sequence[Tensor]) -> int:
        """Parameters of the network that `kept` leaves, without building it."""
        units, total = self.graph.kept_units(kept), self.dense_params
        for operation in self.graph.operations:
            if operation.module is None:
                continue
            module = self.model.get_submodule(operation.module)
            left = self.graph.kept_channels(units, operation.outputs).mean()
            read = self.graph.kept_channels(units, operation.inputs).mean()
            matrix = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
            for name, parameter in module.named_parameters(recurse=False):
                rows = 1.0 if isinstance(module, nn.Linear) else left
                share = rows * read if matrix and name == "weight" else rows
                total -= round(parameter.numel() * (1 - share))
        return total

    def evaluate(self, cut: Cut) -> dict[str, float]:
        """Build the network and measure its test accuracy as cut and with BatchNorm recalibrated (reads the images)."""
        settings, space = self.space.settings, self.space
        if not space.images.exists():
            stage = f"python -m experiments data --scale {space.scale} --experiment {space.name}"
            raise UserError(f"data file {space.images.name} does not exist; make it with: {stage}")
        compute = settings.compute.resolve()
        images = data.load(space.images).to(compute.device)
        small = legr.prune(self.model, self.graph, cut.kept).to(compute.device, memory_format=torch.channels_last)
        before = training.evaluate(small, images.test, compute)["accuracy"]
        picked = torch.randperm(len(images.fit), generator=torch.Generator().manual_seed(0))
        training.recalibrate(small, images.fit[picked[: settings.finetune.recalibration_images]], compute)
        return {"as cut": before, "recalibrated": training.evaluate(small, images.test, compute)["accuracy"]}


def _dense(space: Workspace) -> nn.Module:
    """The dense network; its number of classes is read from its weights, for there may be no images."""
    try:
        with safe_open(space.baseline, "pt") as file:
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"weights file {space.baseline} does not exist; run the pipeline (dvc repro) first") from None
    except Exception as error:
        raise UserError(f"weights file {space.baseline} is not a whole safetensors file ({error})") from None
    classes = [shape[0] for shape in shapes if len(shape) == 2]
    return models.load_weights(models.build(space.settings.model, classes[-1] if classes else 1, 0), space.baseline)


def _curves(space: Workspace, method: str, dense_flops: int) -> tuple[pd.Series, pd.Series, int]:
    """Measured accuracy and latency over FLOPs (index), the dense network's included; the latency's batch size."""
    try:
        table = pd.read_csv(space.results / "tradeoff.csv")
        times = pd.read_csv(space.results / "latency.csv")
        dense = pd.read_json(space.results / "baseline.json", typ="series").accuracy
    except FileNotFoundError as error:
        raise UserError(f"results file {error.filename} does not exist; run the pipeline (dvc repro) first") from None
    accuracy = table[table.method == method].groupby("flops").accuracy.mean()
    accuracy.loc[dense_flops] = dense
    batch = int(times.batch.max())
    latency = times[times.method.isin([method, "dense"]) & (times.batch == batch)].groupby("flops").latency_ms.mean()
    return accuracy.sort_index(), latency.sort_index(), batch


def _read_off(curve: pd.Series, flops: int) -> float | None:
    """Between measured points a straight line; outside of them nothing."""
    if not curve.index[0] <= flops <= curve.index[-1]:
        return None
    return float(np.interp(flops, curve.index.to_numpy(float), curve.to_numpy()))


class Panel:
    """Bars of the widths per layer. What never changes is drawn once and kept, so that a move is quick."""

    def __init__(self, instrument: Instrument):
        graph = instrument.graph
        figure = Figure(figsize=(10, 3.1), dpi=80)
        figure.set_layout_engine("none")
        self.canvas = FigureCanvasAgg(figure)
        self.ax = ax = figure.add_axes((0.065, 0.2, 0.925, 0.7))
        layers = range(1, len(graph.layers) + 1)
        ax.bar(layers, graph.widths, color="#E3E3E3", width=0.9, label="dense")
        self.bars = ax.bar(layers, graph.widths, color=COLORS["legr"], width=0.9, label="kept", animated=True)
        marks = {"color": "#000000", "ms": 6, "label": "kept by the learned ranking", "animated": True}
        (self.marks,) = ax.plot(layers, graph.widths, "_", **marks)
        self.title = ax.set_title("", loc="left", fontsize=11, animated=True)
        ax.set(xlabel="prunable layer, in execution order", ylabel="filters", xlim=(0.3, len(graph.layers) + 0.7))
        ax.legend(loc="upper left", fontsize=8)
        ax.grid(visible=False, axis="x")
        self.canvas.draw()
        self.background = self.canvas.copy_from_bbox(figure.bbox)

    def png(self, cut: Cut, learned: Cut, title: str) -> bytes:
        self.canvas.restore_region(self.background)
        for bar, width in zip(self.bars, cut.widths, strict=True):
            bar.set_height(width)
            self.ax.draw_artist(bar)
        self.marks.set_ydata(learned.widths)
        self.title.set_text(title)
        self.ax.draw_artist(self.marks)
        self.ax.draw_artist(self.title)
        buffer = io.BytesIO()
        Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB").save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def describe(instrument: Instrument, cut: Cut) -> pd.DataFrame:
    """One row of numbers about a cut; a dash where nothing was measured."""
    latency = "–" if cut.latency_ms is None else f"{cut.latency_ms:.1f} ms"
    accuracy = "–" if cut.accuracy is None else f"{100 * cut.accuracy:.2f}%"
    row = {
        "MFLOPs": f"{cut.flops / 1e6:.1f}",
        "FLOPs / dense": f"{cut.flops / instrument.dense_flops:.1%}",
        "parameters": f"{cut.params:,}",
        f"latency, batch {instrument.batch} (interpolated)": latency,
        "accuracy, fine-tuned (interpolated)": accuracy,
    }
    return pd.DataFrame([row], index=[instrument.method])


class Controls:
    """Sliders and a button over an `Instrument`; display `Controls(...)` as the last line of a cell."""

    def __init__(self, instrument: Instrument, flops: float = 0.47):
        self.instrument, self.panel = instrument, Panel(instrument)
        graph = instrument.graph
        long, wide = widgets.Layout(width="98%"), {"description_width": "9em"}
        self.flops = widgets.FloatSlider(
            flops,
            min=0.1,
            max=1.0,
            step=0.01,
            description="FLOPs / dense",
            readout_format=".2f",
            layout=long,
            style=wide,
        )
        names = [(f"{i + 1}: {layer.name} ({layer.width})", i) for i, layer in enumerate(graph.layers)]
        self.layer = widgets.Dropdown(options=names, description="tilt layer", style=wide)
        self.scale = widgets.FloatLogSlider(1.0, min=-1, max=1, step=0.05, description="its α ×", style=wide)
        self.shift = widgets.FloatSlider(0.0, min=-3, max=3, step=0.1, description="its κ + s ×", style=wide)
        self.button = widgets.Button(
            description="Prune and evaluate", tooltip="on the test images", layout=widgets.Layout(width="12em")
        )
        self.image, self.numbers = widgets.Image(format="png", layout=long), widgets.HTML()
        self.result = widgets.HTML()
        for control in (self.flops, self.layer, self.scale, self.shift):
            control.observe(self._moved, "value")
        self.button.on_click(self._evaluate)
        tilts = widgets.HBox([self.layer, self.scale, self.shift])
        parts = [self.flops, tilts, self.image, self.numbers, widgets.HBox([self.button, self.result])]
        self.box = widgets.VBox(parts)
        self.update()

    @property
    def ranking(self) -> legr.Ranking:
        return self.instrument.tilted(self.layer.value, self.scale.value, self.shift.value)

    def update(self) -> None:
        """Redraw for the controls' values."""
        try:
            cut = self.instrument.cut(self.flops.value, self.ranking)
            learned = self.instrument.cut(self.flops.value)
        except UserError as error:
            self.numbers.value, self.button.disabled = f"<b>{error}</b>", True
            return
        self.cut, self.button.disabled = cut, False
        changed = sum(a != b for a, b in zip(cut.widths, learned.widths, strict=True))
        title = f"{self.instrument.method} at {cut.flops / self.instrument.dense_flops:.1%} of the FLOPs"
        title += f" · {changed} layers differ from the learned ranking" if changed else ""
        self.image.value = self.panel.png(cut, learned, title)
        row = describe(self.instrument, cut).iloc[0]
        self.numbers.value = " · ".join(f"{name}: <b>{value}</b>" for name, value in row.items())

    def _moved(self, _) -> None:
        self.result.value = ""
        self.update()

    def _evaluate(self, _) -> None:
        self.result.value = "pruning and evaluating …"
        try:
            found = self.instrument.evaluate(self.cut)
            told = ", ".join(f"{name} <b>{100 * value:.2f}%</b>" for name, value in found.items())
            self.result.value = f"measured test accuracy: {told} (no fine-tuning)"
        except UserError as error:
            self.result.value = str(error)

    def _repr_mimebundle_(self, **options) -> dict:
        """The widgets where they can live, and a picture where they can't (a rendered or executed notebook)."""
        bundle = dict(self.box._repr_mimebundle_(**options) or {})
        bundle["text/plain"] = f"{self.instrument.method} at {self.flops.value} of the FLOPs"
        bundle["image/png"] = base64.b64encode(self.image.value).decode()
        return bundle
