"""Rankings as an instrument for JupyterLab: move the FLOP count, tilt layers, see what is kept and how good it is."""

import asyncio
import base64
import contextlib
import io
import math

import ipywidgets as widgets
import pandas as pd
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.analysis.figures import COLORS, LABELS, MARKERS, bars
from experiments.experiment import Experiment
from experiments.interactive.cutter import REACH, RECALIBRATED, TUNED, Cutter, Tilt
from experiments.methods import DENSE, METHODS
from experiments.stats import paired
from legr.files import UserError

REST = 0.4  # seconds without a change after which the network is judged
WIDTH, DENSITY = 960, 2  # pixels of the picture where it is shown, and how many of its own there are for each


class Explorer(widgets.VBox):
    """Controls and a picture over an experiment's `cutter`; display it as the last line of a cell.

    Tilts of several layers add up. When no control moves, the network is judged on the sample's test images.

    Args:
        method: whose ranking is shown first.
        target: the fraction of the FLOPs at which the slider starts; None: in the middle of the experiment's targets.

    Raises:
        UserError: there is no such method, no network was measured at `target`, or results are missing.
    """

    def __init__(self, exp: Experiment, method: str = "legr", target: float | None = None):
        self.cutter, self.tilts = Cutter(exp), {}
        self.task = self.drawn = None
        self.cutter.ranking(method, {})  # refuses an unknown method
        targets, lowest = sorted(exp.settings.targets), self.cutter.lowest
        target = targets[len(targets) // 2] if target is None else target
        if not lowest <= target <= 1:
            raise UserError(f"target is {target}; it must be from {lowest} to 1, between which networks were measured")
        methods = [(LABELS[name], name) for name in exp.methods]
        third, half, whole = (
            {"layout": widgets.Layout(width=width), "style": {"description_width": "7.5em"}}
            for width in ("38%", "48.5%", "98%")
        )
        self.method = widgets.Dropdown(options=methods, value=method, description="method", **third)
        self.beside = widgets.Dropdown(options=[("nothing", None), *methods], description="beside it", **third)
        self.beside.value = "norm" if "norm" in exp.methods else None
        self.target = widgets.FloatSlider(target, min=lowest, max=1, step=0.01, description="FLOPs left", **whole)
        self.target.readout_format = ".0%"
        reach = self.cutter.reach(method, target)
        self.layer = widgets.Dropdown(
            options=range(len(reach)), value=reach.index(max(reach)), description="tilt layer", **third
        )
        half["continuous_update"] = False  # a tilt is one change, when the mouse lets go
        scale, shift = math.log10(REACH[0]), REACH[1]
        self.scale = widgets.FloatLogSlider(1, min=-scale, max=scale, step=0.05, description="α times", **half)
        self.shift = widgets.FloatSlider(0, min=-shift, max=shift, step=0.1, description="κ plus s times", **half)
        self.reset = widgets.Button(description="reset tilts")
        self.save, self.saved = widgets.Button(description="save network"), widgets.HTML()
        for button in (self.reset, self.save):
            button.layout = widgets.Layout(width="max-content", flex="none")
        self.image = widgets.Image(layout=widgets.Layout(width=f"{WIDTH}px", max_width="100%"))
        self.changes, self.numbers, self.verdict = (widgets.HTML() for _ in range(3))
        rows = (
            [self.method, self.beside], [self.target], [self.layer, self.reset], [self.scale, self.shift],
            [self.changes], [self.image], [self.numbers], [self.verdict], [self.save, self.saved],
        )  # fmt: skip
        super().__init__([widgets.HBox(row) for row in rows])

        for control in (self.method, self.beside, self.target):
            control.observe(self._change, "value")
        self.layer.observe(self._choose, "value")
        for control in (self.scale, self.shift):
            control.observe(self._tilt, "value")
        self.reset.on_click(self._reset)
        self.save.on_click(self._save)
        self._cut()
        self._judge()
        self._offer_layers()

    def _offer_layers(self) -> None:
        """Name the layers to choose from; those that no tilt can move at this cut are marked."""
        method, chosen = self.method.value, self.layer.value
        reach = self.cutter.reach(method, self.target.value)
        self.layer.unobserve(self._choose, "value")
        self.layer.options = [
            (f"{i + 1}: {layer.name} ({layer.width}{'' if reach[i] else ', can not move here'})", i)
            for i, layer in enumerate(self.cutter.graph.layers)
        ]
        self.layer.value = chosen
        self.layer.observe(self._choose, "value")

    # What the reader does --------------------------------------------------------------------
    def _choose(self, _) -> None:
        self._show_tilt()
        self._show()

    def _show_tilt(self) -> None:
        """Set the sliders to the tilt of the layer that is chosen, which is no change of the reader's."""
        tilt = self.tilts.get(self.layer.value, Tilt())
        for control, value in ((self.scale, tilt.scale), (self.shift, tilt.shift)):
            control.unobserve(self._tilt, "value")
            control.value = value
            control.observe(self._tilt, "value")

    def _tilt(self, _) -> None:
        tilt = Tilt(round(self.scale.value, 4), round(self.shift.value, 4))
        tilts = self.tilts | {self.layer.value: tilt}
        self.tilts = {layer: tilt for layer, tilt in sorted(tilts.items()) if tilt != Tilt()}
        self._change()

    def _reset(self, _) -> None:
        self.tilts = {}
        self._show_tilt()
        self._change()

    def _change(self, _=None) -> None:
        """Cut and draw at once; judge when nothing has moved for a while."""
        if self.task:
            self.task.cancel()
        if not self._cut():
            return
        try:
            self.task = asyncio.get_running_loop().create_task(self._rest_and_judge())
        except RuntimeError:  # a script: nothing happens meanwhile
            self._judge()

    async def _rest_and_judge(self) -> None:
        await asyncio.sleep(REST)
        for cut in (self.untilted, self.shown):  # in a thread: the controls go on working
            with contextlib.suppress(UserError):  # which `_judge` shows
                await asyncio.to_thread(self.cutter.judge, cut.kept)
        self._judge()
        with contextlib.suppress(UserError):
            await asyncio.to_thread(self.cutter.reach, self.method.value, self.target.value)
            self._offer_layers()

    def _save(self, _) -> None:
        self.saved.value = "saving …"
        try:
            self.saved.value = "saved: " + ", ".join(self.cutter.save(self.shown))
        except UserError as error:
            self.saved.value = f"<b>{error}</b>"

    # What the reader sees --------------------------------------------------------------------
    def _cut(self) -> bool:
        """Cut for the controls' values and show it; False if there is no such cut, which is said."""
        cutter, method, target = self.cutter, self.method.value, self.target.value
        plain, self.saved.value = METHODS[method].uniform, ""
        names = [
            f"{i + 1} (α × {tilt.scale:.3g}, κ {'+' if tilt.shift >= 0 else '−'} {abs(tilt.shift):.3g} s)"
            for i, tilt in self.tilts.items()
        ]
        tilted = "tilted layers: " + (", ".join(names) or "none")
        self.changes.value = f"{LABELS[method]} has no α and κ to tilt" if plain else tilted
        for control in (self.layer, self.scale, self.shift):
            control.disabled = plain
        self.reset.disabled = plain or not self.tilts
        try:
            self.untilted = self.shown = cutter.cut(method, target)
            if self.tilts and not plain:
                self.shown = cutter.cut(method, target, self.tilts)
                if self.shown.widths == self.untilted.widths:
                    self.changes.value += "; no width changes"
            beside = self.beside.value
            self.other = None if beside in (None, method) else cutter.cut(beside, target)
        except UserError as error:
            self.numbers.value, self.verdict.value, self.save.disabled = f"<b>{error}</b>", "", True
            return False
        numbers = pd.Series(self.shown.numbers).drop(RECALIBRATED).map("{:,.2f}".format).replace("nan", "–")
        self.numbers.value = " · ".join(f"{name}: <b>{number}</b>" for name, number in numbers.items())
        self.save.disabled = False
        self._show()
        return True

    def _judge(self) -> None:
        try:
            for cut in (self.untilted, self.shown):
                self.cutter.judge(cut.kept)
        except UserError as error:
            self.verdict.value = f"<b>{error}</b>"
        else:
            self._show()

    def _show(self) -> None:
        """Draw the cut, and say what is known of its accuracy."""
        if self.drawn != self.shown.method:
            self.drawn, self.moving = self.shown.method, []
            self._draw_what_stays()
        for artist in self.moving:
            artist.remove()
        for layer, (bar, width) in enumerate(zip(self.bars, self.shown.widths, strict=True)):
            bar.set_height(width)
            bar.set(ec=DENSE, lw=1.2 if layer == self.layer.value and not METHODS[self.drawn].uniform else 0)
        (left, right), plain = self.figure.axes, self.untilted
        layers, x, y = range(1, len(plain.widths) + 1), plain.numbers["MFLOPs"], plain.numbers[RECALIBRATED]
        style = {"color": COLORS[plain.method], "mec": DENSE, "mew": 1.8, "ms": 11}
        self.moving = [right.axvline(x, color=DENSE, lw=0.8, alpha=0.4, zorder=0)]
        label = "shown network" if self.shown is plain else "untilted"
        self.moving += right.plot(x, y, MARKERS[plain.method], label=label, **style)
        if self.other:
            name, style = self.other.method, {"mec": "white", "mew": 0.5, "ms": 4.5}
            self.moving += left.plot(layers, self.other.widths, MARKERS[name], color=COLORS[name],
                                     label=LABELS[name], **style)  # fmt: skip
        if self.shown is not plain:
            self.moving += left.plot(layers, plain.widths, "_k", mew=1.5, label="untilted")
        left.set_title(f"{LABELS[plain.method]}: {plain.target:.0%} of the FLOPs", loc="left")

        before, after = (self.cutter.judged(cut.kept) for cut in (plain, self.shown))
        self.verdict.value = "judging …"
        if before is not None and after is not None:
            share, others = after.double().mean().item(), before.double().mean().item()
            half = 1.96 * (share * (1 - share) / len(after)) ** 0.5
            accuracy = f"<b>{share:.1%}</b> ± {half:.1%}"
            if self.shown is not plain:
                more, half = (100 * number for number in paired(before, after))
                accuracy = f"<b>{share:.1%}</b>, without the tilts {others:.1%}: <b>{more:+.1f} points</b>, "
                accuracy += f"95% interval {more - half:+.1f} to {more + half:+.1f} "
                accuracy += f"({(after & ~before).sum()} images became right, {(before & ~after).sum()} wrong)"
                accuracy = accuracy.replace("-", "−")
                at = self.shown.numbers["MFLOPs"], y + more
                self.moving += [right.errorbar(*at, half, fmt="Xk", ms=9, mec="white", capsize=4, label="tilted")]
            what = f"on {len(after)} test images, BatchNorm recalibrated, not fine-tuned"
            self.verdict.value = f"{what}: {accuracy}"
        right.relim()
        right.autoscale()
        for ax, columns in ((left, 4), (right, 2)):
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=columns, fontsize=9, handlelength=1.5)
        picture = io.BytesIO()
        FigureCanvasAgg(self.figure).print_png(picture, pil_kwargs={"compress_level": 1})
        self.image.value = picture.getvalue()

    def _draw_what_stays(self) -> None:
        """A new figure: a bar for each layer (left); all methods' measured accuracy over FLOPs (right)."""
        cutter, method = self.cutter, self.drawn
        self.figure = Figure(figsize=(WIDTH / 100, 4.4), dpi=100 * DENSITY, layout="none")  # layout engines are slow
        left, right = self.figure.subplots(1, 2, width_ratios=(4, 3))
        self.figure.subplots_adjust(left=0.082, right=0.99, bottom=0.35, top=0.93, wspace=0.17)
        self.bars = bars(left, cutter.graph.widths, cutter.graph.widths, method)
        for rim, (name, curve) in zip(reversed(range(len(cutter.curves))), cutter.curves.items(), strict=True):
            pruned, tuned = curve[RECALIBRATED], curve[TUNED].iloc[:-1]
            style = {"color": COLORS[name], "lw": 1.5 + rim / 2, "ms": 6 + rim}  # thinner than those under it: all show
            right.plot(pruned.index / 1e6, pruned, **style)
            right.plot(tuned.index / 1e6, tuned, MARKERS[name], **style)
            right.plot([], [], marker=MARKERS[name], label=LABELS[name], **style)
        right.plot(curve[TUNED].index[-1] / 1e6, curve[TUNED].iloc[-1], "D", color=DENSE, label="dense network")
        right.set(xlabel="MFLOPs (one image)", ylabel="test accuracy (%)")
        right.set_title("curves: recalibrated; marks: fine-tuned", loc="left")

    def _repr_mimebundle_(self, **options):
        """The widgets where they can live, and a picture where they can't (a rendered or executed notebook)."""
        picture = base64.b64encode(self.image.value).decode()
        return super()._repr_mimebundle_(**options) | {"image/png": picture}, {"image/png": {"width": WIDTH}}
