"""The fitness of a ranking (Eq. 3): prune by it, take τ̂ gradient steps, measure the loss on held-out images."""

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse

from legr.data import Dataset
from legr.files import Settings, UserError
from legr.graph import Graph, reads
from legr.ranking import FLOOR, Ranking, filter_norms, select
from legr.surgery import prune
from legr.training import Compute, Recipe, evaluate, recalibrate, take_steps

Masks = list[Tensor]  # one bool tensor [width] per layer


class FitnessSettings(Settings):
    """What a pruned network goes through before its loss is measured.

    The paper: no recalibration; τ̂ = 0 steps on CIFAR-10, 200 on CIFAR-100 and ImageNet.
    """

    steps: NonNegativeInt = 0  # τ̂: of SGD with momentum 0.9 and weight decay 5e-4, on training images
    lr: PositiveFloat = 0.01  # of these steps, constant
    batch_size: PositiveInt = 128  # of these steps
    recalibration_images: NonNegativeInt = 0  # re-estimate BatchNorm statistics on so many training images
    validation_images: PositiveInt | None = None  # None: all held-out images


@dataclass
class Fitness:
    """Judges rankings by the networks that each cuts out of `model` at `targets`, fractions of the dense FLOPs.

    With several targets the loss is the mean over them, from the largest down. There a loss above ln(classes),
    which is what guessing costs, counts as ln(classes), and smaller networks are not tried.
    """

    model: nn.Module
    graph: Graph
    data: Dataset
    targets: Sequence[float]
    settings: FitnessSettings
    compute: Compute
    floor: float = FLOOR
    seed: int = 0
    keep: Collection[str] = ()  # layers that stay whole, see `select`

    def __post_init__(self):
        if self.data.train.shape != self.graph.inputs:
            traced, given = list(self.graph.inputs), list(self.data.train.shape)
            raise UserError(f"data has images {given}; graph was traced with an example input of {traced}")
        self.targets = sorted(self.targets, reverse=True)
        if not self.targets:
            raise UserError("targets is empty; it must have one fraction of the FLOPs or more")
        self.norms = filter_norms(self.model, self.graph)
        self.model = copy.deepcopy(self.model).to(self.compute.device, memory_format=torch.channels_last).eval()
        generator = torch.Generator().manual_seed(self.seed)
        train = self.data.fit
        shuffled = torch.randperm(len(train), generator=generator)[: self.settings.recalibration_images]
        self.recalibration = train[shuffled].load().to(self.compute.device) if len(shuffled) else None
        self.train = train.to(self.compute.device) if self.settings.steps else None
        picked = torch.randperm(len(self.data.holdout_index), generator=generator)[: self.settings.validation_images]
        self.validation = self.data.train[self.data.holdout_index[picked]].load().to(self.compute.device)

    def select(self, ranking: Ranking) -> list[Masks]:
        """What `ranking` keeps at each of `targets`."""
        scores = ranking.scores(self.norms)
        return [select(self.graph, scores, target, floor=self.floor, keep=self.keep) for target in self.targets]

    def network(self, kept: Masks) -> nn.Module:
        """The network that is judged: pruned, tuned by τ̂ steps, recalibrated, as the settings ask."""
        small = prune(self.model, self.graph, kept).to(memory_format=torch.channels_last)
        settings = self.settings
        if settings.steps:
            recipe = Recipe(epochs=1, batch_size=settings.batch_size, lr=settings.lr, nesterov=False)
            take_steps(small, self.train, recipe, settings.steps, self.compute, self.seed)
        if settings.recalibration_images:
            recalibrate(small, self.recalibration, self.compute)
        return small.eval()

    def __call__(self, networks: Sequence[Masks]) -> dict[str, float]:
        """Validation `loss` and `accuracy` of what `select` gave: the mean loss, and the largest network's accuracy."""
        guess = math.log(len(self.data.classes)) if len(networks) > 1 else math.inf
        losses, accuracies = [], []
        for kept in networks:
            result = evaluate(for_evaluation(self.network(kept), self.compute), self.validation, self.compute)
            losses.append(min(result["loss"], guess) if math.isfinite(result["loss"]) else guess)
            accuracies.append(result["accuracy"])
            if losses[-1] == guess < math.inf:
                losses += [guess] * (len(networks) - len(losses))
                break
        return {"loss": sum(losses) / len(losses), "accuracy": accuracies[0]}


def for_evaluation(network: fx.GraphModule, compute: Compute) -> fx.GraphModule:
    """`network` changed in place: BatchNorm folded into convolutions, weights in the precision of `compute`.

    Where a tensor is read twice nothing is folded: `fuse` would change it for the other reader, too.
    """
    dtype = torch.bfloat16 if compute.precision == "bfloat16" else torch.float32
    shared = any(count > 1 for count in reads(network).values())
    return (network if shared else fuse(network, inplace=True, no_trace=True)).to(dtype)
