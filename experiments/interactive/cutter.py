"""What an experiment's rankings keep at any FLOP count, as they are or tilted: networks to judge at once, and to save.

It needs committed results, with some images among them (samples.py); no data set, no training.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

import legr
from experiments.experiment import Experiment
from experiments.interactive import export, samples
from experiments.methods import METHODS
from legr.files import UserError, digest
from legr.fitness import for_evaluation
from legr.search import norm_deviations
from legr.training import predict, recalibrate

REACH = 10.0, 3.0  # the strongest tilt: α times or divided by, and κ plus or minus so many deviations
RECALIBRATED, TUNED = "accuracy, BatchNorm recalibrated (%)", "accuracy, fine-tuned (%)"


class Tilt(NamedTuple):
    """A layer's Eq. 1, changed: α is multiplied by `scale`, and κ moved by `shift` deviations of the layer's norms."""

    scale: float = 1.0
    shift: float = 0.0


Tilts = Mapping[int, Tilt]  # by layer, counted from 0


class Cut(NamedTuple):
    """What a method keeps at one FLOP count: masks and widths per layer, and numbers for display."""

    method: str
    target: float
    ranking: legr.Ranking | None  # with its tilts; uniform has none
    kept: list[Tensor]
    widths: list[int]
    numbers: dict[str, float]  # latency and accuracy lie between measured ones; NaN where nothing was measured


class Cutter:
    """The networks that an experiment's methods cut.

    Raises:
        UserError: results are missing.
    """

    def __init__(self, exp: Experiment):
        self.exp, self.graph, self._judged, self._reach = exp, exp.graph, {}, {}
        try:
            self.cuts = exp.cuts
            self.table, self.times = (pd.read_csv(exp.path(f"compare/{name}.csv")) for name in ("tradeoff", "latency"))
        except FileNotFoundError as error:
            raise UserError(f"results file {error.filename} does not exist; run the pipeline (dvc repro)") from None
        self.curves = {method: self._curves(method) for method in exp.methods}
        self.lowest = float(self.cuts.share.min())  # of all FLOPs; there the methods' curves begin

    def _curves(self, method: str) -> dict[str, pd.Series]:
        """What was measured of a method's networks, over their FLOPs."""
        times, cuts, table = (
            table[table.method.isin([method, "dense"])] for table in (self.times, self.cuts, self.table)
        )
        batch = times.batch.max()
        tuned = table.groupby("target")[["flops", "accuracy"]].mean().set_index("flops").accuracy  # over trials
        tuned[self.graph.flops()] = self.exp.dense["accuracy"]
        return {
            f"latency, batch {batch} (ms)": times[times.batch == batch].groupby("flops").latency_ms.mean(),
            RECALIBRATED: 100 * cuts.groupby("flops").accuracy_recalibrated.mean(),
            TUNED: 100 * tuned,  # the last one is the dense network
        }

    def ranking(self, method: str, tilts: Tilts) -> legr.Ranking | None:
        """A method's ranking in the first trial, tilted; None for uniform, which has none."""
        if method not in self.exp.methods:
            raise UserError(f"method is {method!r}; it must be one of {', '.join(self.exp.methods)}")
        if METHODS[method].uniform:
            if tilts:
                raise UserError(f"tilts has {len(tilts)} layers; it must be empty, for {method} has no α and κ to tilt")
            return None
        norms = self.exp.norms
        ranking = self.exp.ranking(method, 0) or legr.Ranking.norm_only(len(norms))
        alpha, kappa, deviations = list(ranking.scale), list(ranking.shift), norm_deviations(norms)
        for layer, (scale, shift) in tilts.items():
            if layer not in range(len(norms)):
                raise UserError(f"tilts has layer {layer!r}; it must be a number from 0 to {len(norms) - 1}")
            alpha[layer] *= scale
            kappa[layer] += shift * deviations[layer]
        return legr.Ranking(tuple(alpha), tuple(kappa))

    def cut(self, method: str, target: float, tilts: Tilts | None = None) -> Cut:
        """What a method keeps at the fraction `target` of the FLOPs, by its ranking with `tilts` added.

        Raises:
            UserError: so few FLOPs can't be reached, or there is no such method or layer.
        """
        ranking, graph, floor = self.ranking(method, tilts or {}), self.graph, self.exp.settings.floor
        kept = METHODS[method].select(graph, self.exp.norms, ranking, target, floor)
        flops = graph.flops(kept)
        numbers = {"MFLOPs": flops / 1e6, "FLOPs / dense (%)": 100 * flops / graph.flops()}
        numbers["parameters (thousands)"] = graph.params(kept) / 1e3
        for name, curve in self.curves[method].items():
            numbers[name] = np.interp(flops, curve.index, curve, left=np.nan, right=np.nan)
        if tilts:
            numbers |= {RECALIBRATED: np.nan, TUNED: np.nan}  # measured of the ranking as it is
        return Cut(method, target, ranking, kept, [int(mask.sum()) for mask in kept], numbers)

    def reach(self, method: str, target: float) -> list[int]:
        """For each layer by how many filters its width differs between the strongest tilts, up and down; remembered."""
        if (method, target) not in self._reach:
            scale, shift = REACH
            self._reach[method, target] = [
                0 if METHODS[method].uniform else
                self.cut(method, target, {layer: Tilt(scale, shift)}).widths[layer]
                - self.cut(method, target, {layer: Tilt(1 / scale, -shift)}).widths[layer]
                for layer in range(len(self.graph.layers))
            ]  # fmt: skip
        return self._reach[method, target]

    @functools.cached_property
    def samples(self) -> samples.Samples:
        """The images to judge on, on the device."""
        images, device = samples.read(self.exp), self.exp.compute.device
        return images._replace(test=images.test.to(device), train=images.train.to(device))

    def network(self, kept: list[Tensor]) -> nn.Module:
        """A pruned network with BatchNorm's statistics re-estimated from the sample's training images; not trained."""
        small = legr.prune(self.exp.model, self.graph, kept).to(self.exp.compute.device)
        small.to(memory_format=torch.channels_last)
        recalibrate(small, self.samples.train, self.exp.compute)
        return small

    def judge(self, kept: list[Tensor]) -> Tensor:
        """Which of the sample's test images the `network` gets right, bool [N]; remembered."""
        key = torch.cat(kept).numpy().tobytes()
        if key not in self._judged:
            test, compute = self.samples.test, self.exp.compute
            logits = predict(for_evaluation(self.network(kept), compute), test, compute)
            self._judged[key] = logits.argmax(1) == test.labels.cpu()
        return self._judged[key]

    def judged(self, kept: list[Tensor]) -> Tensor | None:
        """What `judge` gave; None if it was not asked."""
        return self._judged.get(torch.cat(kept).numpy().tobytes())

    def save(self, cut: Cut) -> list[str]:
        """Write the `network` of a cut below playground/saved by `export.write`; returns the three paths."""
        exp, settings = self.exp, self.exp.settings
        about = {"scale": exp.scale, "experiment": exp.name, "model": settings.model, "method": cut.method}
        about |= {"target": cut.target, "floor": settings.floor, "ranking": cut.ranking and vars(cut.ranking)}
        about |= {"flops": self.graph.flops(cut.kept), "params": self.graph.params(cut.kept)}
        about |= {"inputs": settings.data.shape, "normalization": settings.data.normalization.model_dump()}
        about["training"] = f"none; BatchNorm re-estimated from {len(self.samples.train)} training images"
        small = self.network(cut.kept).cpu().to(memory_format=torch.contiguous_format)
        inputs = next(self.samples.test[:2].batches(2))[0].cpu().contiguous()
        name = f"{exp.scale}-{exp.name}-{cut.method}-{cut.target:g}-{digest(about)[:6]}"
        paths = export.write(small, about, inputs, exp.root / "playground/saved" / name)
        return [path.relative_to(exp.root).as_posix() for path in paths]
