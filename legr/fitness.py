"""How good is a ranking? Three answers, all measured on the network that it cuts (Eq. 3).

`loss` is the paper's τ = 0: the validation loss of the network as cut. `recalibrated` re-estimates
BatchNorm statistics on training images first. `steps` takes τ gradient steps first.
"""

import copy
import hashlib
import math
from dataclasses import dataclass, field
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt
from torch import nn

from legr.data import Dataset, Files, Images, in_turn
from legr.graph import Graph
from legr.inference import can_be_fast, fast_inference
from legr.ranking import Ranking, check_fraction, filter_norms, select
from legr.surgery import prune
from legr.training import Compute, Recipe, evaluate, image_losses, recalibrate, train

KEPT = 64  # networks that `Fitness.part` remembers
Kind = Literal["loss", "recalibrated", "steps"]


class FitnessSettings(BaseModel):
    """What candidates are judged by, on the held-out images."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Kind = "loss"
    validation_images: PositiveInt | None = None  # None: all held-out images
    recalibration_images: PositiveInt = 1500  # for `recalibrated`, drawn from the training images
    steps: PositiveInt = 200  # τ, for `steps`
    lr: PositiveFloat = 0.01  # for `steps`
    batch_size: PositiveInt = 128  # for `steps`
    flip: bool = True  # for `steps`: mirror half of the images
    # For `recalibrated` and `steps`, further fractions of the dense FLOPs to judge at, see `Fitness`.
    also_at: tuple[Annotated[float, Field(gt=0, le=1)], ...] = ()

    def counts(self, flops: float) -> list[float]:
        """All fractions of the dense FLOPs at which a ranking is judged, the largest first."""
        return sorted({flops, *(self.also_at if self.kind != "loss" else ())}, reverse=True)


@dataclass
class Fitness:
    """Judges rankings by the network that each cuts out of `model` at the fraction `flops`.

    With `settings.also_at` by several networks of each ranking, from the largest down, and their mean
    loss. There a loss above ln(classes), a guess's, counts as a guess, and so do all smaller networks,
    untried: where a network guesses, how confidently it is wrong says nothing about the ranking.
    """

    model: nn.Module
    graph: Graph
    data: Dataset
    flops: float
    settings: FitnessSettings
    compute: Compute
    seed: int = 0
    _kept: dict[Ranking, nn.Module] = field(default_factory=dict, init=False, repr=False)  # the last used is last

    def __post_init__(self):
        check_fraction("flops", self.flops)
        self.model = copy.deepcopy(self.model).to(self.compute.device, memory_format=torch.channels_last).eval()
        self.norms = filter_norms(self.model, self.graph)
        generator = torch.Generator().manual_seed(self.seed)
        shuffled = torch.randperm(len(self.data.fit), generator=generator)
        # What every candidate sees is decoded once; τ steps may take more images than fit in memory.
        few = self.data.fit[shuffled[: self.settings.recalibration_images]]
        self.training = self.data.fit if self.settings.kind == "steps" else few.load()
        self.training = self.training.to(self.compute.device)
        picked = torch.randperm(len(self.data.holdout), generator=generator)[: self.settings.validation_images]
        picked = picked[in_turn(self.data.holdout.labels[picked].cpu())]
        self.validation = self.data.holdout[picked].load().to(self.compute.device)

    def network(self, ranking: Ranking, flops: float | None = None) -> nn.Module:
        """The network that is judged (at `self.flops`, or else `flops`): cut, then treated as the kind asks."""
        small = prune(self.model, self.graph, select(self.graph, ranking.scores(self.norms), flops or self.flops))
        if self.settings.kind == "recalibrated":
            recalibrate(small, self.training, self.compute)
        elif self.settings.kind == "steps":
            tune(small, self.training, self.settings, self.compute, self.seed)
        return small

    def fingerprint(self, ranking: Ranking) -> str:
        """A name of the networks that `ranking` is judged by; with the same name they keep the same filters."""
        scores, found = ranking.scores(self.norms), hashlib.sha256()
        for flops in self.settings.counts(self.flops):
            for kept in select(self.graph, scores, flops):
                found.update(kept.cpu().numpy().tobytes())
        return found.hexdigest()

    def __call__(self, ranking: Ranking) -> dict[str, float]:
        """Validation `loss` and `accuracy` of `network(ranking)`; of several networks the mean, and the largest's."""
        counts = self.settings.counts(self.flops)
        guess = math.log(len(self.data.classes)) if len(counts) > 1 else math.inf
        losses: list[float] = []
        accuracy = math.nan
        for flops in counts:
            result = evaluate(self._ready(ranking, flops), self.validation, self.compute)
            accuracy = accuracy if losses else result["accuracy"]
            losses.append(result["loss"] if result["loss"] < guess else guess)
            if losses[-1] == guess:
                break
        losses += [guess] * (len(counts) - len(losses))
        return {"loss": sum(losses) / len(counts), "accuracy": accuracy}

    def part(self, ranking: Ranking, start: int, stop: int) -> np.ndarray:
        """Of the validation images from `start` to `stop`: their losses, and 1 where right; float32 [2, stop - start].

        Over all images, the mean of the losses is the loss. The network is kept, for the next part.
        """
        network = self._kept.pop(ranking, None) or self._ready(ranking, self.flops)
        self._kept[ranking] = network
        if len(self._kept) > KEPT:
            oldest, *_ = self._kept
            self._kept.pop(oldest, None)  # threads may share a fitness
        losses, right = image_losses(network, self.validation[start:stop], self.compute)
        return torch.stack([losses, right.float()]).cpu().numpy()

    def _ready(self, ranking: Ranking, flops: float) -> nn.Module:
        network = self.network(ranking, flops)
        if can_be_fast(self.compute.device, self.compute.dtype):
            network = fast_inference(network, self.compute.dtype, in_place=True)
        return network


def tune(model: nn.Module, images: Images | Files, settings: FitnessSettings, compute: Compute, seed: int) -> None:
    """`settings.steps` gradient steps at a constant learning rate, in place."""
    per_epoch = max(len(images) // settings.batch_size, 1)
    generator = torch.Generator().manual_seed(seed)
    recipe = Recipe(epochs=1, batch_size=settings.batch_size, lr=settings.lr, milestones=(), flip=settings.flip)
    done = 0
    while done < settings.steps:
        count = min(per_epoch, settings.steps - done)
        picked = torch.randperm(len(images), generator=generator)[: count * settings.batch_size]
        train(model, images[picked], recipe, compute, seed=seed + done)
        done += count
