"""What we measure against, written plainly: the authors' procedures, in float32 and NCHW; and how times are taken."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import legr
from legr import models
from legr.data import Images, normalize
from legr.ranking import MAX_PRUNED, MIN_WIDTH


def side_by_side(functions: Mapping[str, Callable[[], tuple[float, object]]], repetitions: int) -> dict[str, float]:
    """Median of the seconds that each function gives first; they take turns, after one call of each, not counted."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(repetitions + 1):
        for name, function in functions.items():
            seconds, _ = function()
            if repetition:
                times[name].append(seconds)
    return {name: statistics.median(values) for name, values in times.items()}


def timed(function: Callable[[], object]) -> Callable[[], tuple[float, object]]:
    """The same, which gives its seconds first."""

    def with_seconds() -> tuple[float, object]:
        start = time.perf_counter()
        found = function()
        return time.perf_counter() - start, found

    return with_seconds


def plain_select(graph: legr.Graph, scores: list, flops: float) -> list:
    """LeGR-Pruning word for word: one unit after the other, FLOPs counted again after each."""
    importance = np.zeros(graph.unit_count)
    for units, score in zip(graph.units, scores, strict=True):
        np.add.at(importance, units, score.numpy())
    kept, target = np.ones(graph.unit_count, bool), flops * graph.flops()
    for unit in np.argsort(importance, kind="stable"):
        kept[unit] = False
        widths = [int(mask.sum()) for mask in graph.masks(kept)]
        if any(
            n - left > min(math.floor(MAX_PRUNED * n), n - MIN_WIDTH)
            for n, left in zip(graph.widths, widths, strict=True)
        ):
            kept[unit] = True
        elif graph.flops(graph.masks(kept)) < target:
            break
    return graph.masks(kept)


def plain_evaluation(path: Path, graph: legr.Graph, ranking: legr.Ranking, flops: float, images: Images) -> float:
    """The authors' procedure: the network read and cut anew, float32, NCHW, batches of 128."""
    model = models.load_weights(models.resnet56(), path)
    kept = legr.select(graph, ranking.scores(legr.filter_norms(model, graph)), flops)
    small, loss = legr.prune(model, graph, kept).eval(), 0.0
    with torch.inference_mode():
        for start in range(0, len(images), 128):
            part = images[slice(start, start + 128)]
            loss += F.cross_entropy(small(normalize(part.pixels).contiguous()), part.labels, reduction="sum").item()
    return loss / len(images)


def plain_training(model: nn.Module, images: Images) -> None:
    """One epoch in float32, NCHW, batches of 128, without augmentation."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True, weight_decay=5e-4)
    model.train()
    for start in range(0, len(images), 128):
        part = images[slice(start, start + 128)]
        optimizer.zero_grad()
        F.cross_entropy(model(normalize(part.pixels).contiguous()), part.labels).backward()
        optimizer.step()


def random_images(count: int, side: int = 32, seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    return Images(pixels, torch.randint(0, 10, (count,), generator=generator))
