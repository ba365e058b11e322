"""What `benchmarks.apart` runs in processes of their own: made once, then called without arguments."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import legr
from benchmarks.yardstick import plain_evaluation, plain_training, random_images
from legr import models
from legr.data import Dataset
from legr.fitness import Fitness, FitnessSettings, Kind
from legr.training import Compute, Recipe, train

COMMITTED = Path("results/laptop/cifar10-resnet56")
FRACTION = 0.47


def dense_network() -> tuple[nn.Module, legr.Graph]:
    model = models.load_weights(models.resnet56(), COMMITTED / "baseline.safetensors").eval()
    return model, legr.trace(model, torch.zeros(1, 3, 32, 32))


def authors_evaluation(count: int) -> Callable[[], float]:
    (_, graph), images = dense_network(), random_images(count)
    ranking = legr.Ranking.norm_only(len(graph.layers))
    return lambda: plain_evaluation(COMMITTED / "baseline.safetensors", graph, ranking, FRACTION, images)


def our_evaluation(count: int, kind: Kind, compute: Compute) -> Callable[[], dict[str, float]]:
    (model, graph), images = dense_network(), random_images(count)
    data = Dataset("random", list("0123456789"), random_images(2000, seed=1), images, images, "random")
    fitness = Fitness(model, graph, data, FRACTION, FitnessSettings(kind=kind), compute.resolve())
    ranking = legr.Ranking.norm_only(len(graph.layers))
    return lambda: fitness(ranking)


def network_to_train(cut: bool) -> nn.Module:
    model, graph = dense_network()
    if not cut:
        return legr.prune(model, graph, [torch.ones(width, dtype=torch.bool) for width in graph.widths])
    scores = legr.Ranking.load(COMMITTED / "ranking.json").scores(legr.filter_norms(model, graph))
    return legr.prune(model, graph, legr.select(graph, scores, FRACTION))


def authors_training(count: int, cut: bool) -> Callable[[], None]:
    network, images = network_to_train(cut), random_images(count)
    return lambda: plain_training(network, images)


def our_training(count: int, cut: bool, compute: Compute) -> Callable[[], object]:
    compute = compute.resolve()
    network, images = network_to_train(cut), random_images(count).to(compute.device)
    return lambda: train(network, images, Recipe(epochs=1, lr=1e-4), compute, seed=0)
