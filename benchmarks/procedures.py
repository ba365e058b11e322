"""What is timed: the last functions prepare a procedure and return it, ours or (`plain`) what it is compared with.

That is the authors' procedure (github.com/cmu-enyac/LeGR) in plain PyTorch: float32, NCHW, batch after batch, the
network's file read for every candidate. In `pruning` it is Torch-Pruning.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn

import legr
from benchmarks.networks import torch_pruned
from legr import Graph, Ranking, models
from legr.data import Dataset, Images, Normalization
from legr.fitness import Fitness, FitnessSettings
from legr.ranking import FLOOR, MIN_WIDTH
from legr.training import Compute, Recipe, train

COMMITTED = Path("results/laptop/cifar10-resnet56")
DENSE, RANKING = COMMITTED / "dense/network.safetensors", COMMITTED / "rankings/legr/ranking-0.json"
FRACTION, EXAMPLE = 0.47, torch.zeros(1, 3, 32, 32)  # of the dense FLOPs; an input


def plain_select(graph: Graph, scores: Sequence[Tensor], flops: float, floor: float = FLOOR) -> list[Tensor]:
    """As `legr.select`, Fig. 2 word for word: one unit after the other, FLOPs counted after each."""
    importance = np.zeros(graph.unit_count)
    for units, score in zip(graph.units, scores, strict=True):
        np.add.at(importance, units[units >= 0], score.double()[units >= 0])
    kept, target = np.ones(graph.unit_count, bool), flops * graph.flops()
    room = [min(int((1 - floor) * width), width - MIN_WIDTH) for width in graph.widths]
    for unit in np.argsort(importance, kind="stable"):
        kept[unit] = False
        masks = graph.masks(kept)
        if any(int((~mask).sum()) > most for mask, most in zip(masks, room, strict=True)):
            kept[unit] = True
        elif graph.flops(masks) < target:
            break
    return graph.masks(kept)


def plain_loss(model: nn.Module, graph: Graph, ranking: Ranking, images: Images, more: Images | None) -> float:
    """Loss on `images` at `FRACTION`; BatchNorm is recalibrated on `more`, if any. `model` is in eval mode."""
    small, loss = pruned(model, graph, ranking, FRACTION).to(images.device), 0.0
    if more is not None:
        update_bn(_nchw(more, 250), small)
    with torch.inference_mode():
        for inputs, labels in _nchw(images, 128):
            loss += cross_entropy(small(inputs), labels, reduction="sum").item()
    return loss / len(images)


def plain_epoch(model: nn.Module, images: Images) -> None:
    """One epoch of SGD in the images' order, without augmentation; `model` is in training mode."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4)
    for inputs, labels in _nchw(images, 128):
        optimizer.zero_grad()
        cross_entropy(model(inputs), labels).backward()
        optimizer.step()


def _nchw(images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    for pixels, labels in zip(images.pixels.split(size), images.labels.split(size), strict=True):
        yield Normalization()(pixels).contiguous(), labels


def pruned(model: nn.Module, graph: Graph, ranking: Ranking, flops: float) -> nn.Module:
    return legr.prune(model, graph, legr.select(graph, ranking.scores(legr.filter_norms(model, graph)), flops))


def dense_network() -> tuple[nn.Module, Graph, Ranking]:
    """The committed ResNet-56 in eval mode, its graph, and the ranking that was learned for it."""
    model = models.load_weights(models.resnet56(), DENSE).eval()
    return model, legr.trace(model, EXAMPLE), Ranking.load(RANKING)


def random_images(count: int, device: str) -> Images:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 10, (count,), generator=generator)).to(device)


def evaluation(count: int, recalibration: int, compute: Compute, plain: bool) -> Callable[[], float]:
    model, graph, ranking = dense_network()
    images = random_images(count + max(recalibration, 1), compute.device)  # a set without images is refused
    more = images[count:] if recalibration else None
    if plain:
        return lambda: plain_loss(models.load_weights(model, DENSE), graph, ranking, images[:count], more)
    data = Dataset("random", list("0123456789"), images, torch.arange(count), images)
    fitness = Fitness(model, graph, data, [FRACTION], FitnessSettings(recalibration_images=recalibration), compute)
    return lambda: fitness(fitness.select(ranking))["loss"]


def training(count: int, flops: float, compute: Compute, plain: bool) -> Callable[[], object]:
    network = pruned(*dense_network(), flops).to(compute.device).train()
    images, recipe = random_images(count, compute.device), Recipe(epochs=1, batch_size=128, lr=1e-4)
    return lambda: plain_epoch(network, images) if plain else train(network, images, recipe, compute, seed=0)


def structure(build: bool, plain: bool) -> Callable[[], object]:
    model, graph, ranking = dense_network()
    scores, select = ranking.scores(legr.filter_norms(model, graph)), plain_select if plain else legr.select
    make = partial(legr.prune, model, graph) if build else list
    return lambda: make(select(graph, scores, FRACTION))


def pruning(plain: bool) -> Callable[[], nn.Module]:
    model, _, ranking = dense_network()
    if not plain:
        return lambda: pruned(model, legr.trace(model, EXAMPLE), ranking, FRACTION)
    _, steps = torch_pruned(copy.deepcopy(model), EXAMPLE, FRACTION, 100)  # counts FLOPs after each, which takes time
    return lambda: torch_pruned(copy.deepcopy(model), EXAMPLE, FRACTION, 100, steps)[0]
