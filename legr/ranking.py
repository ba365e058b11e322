"""Eq. 1 and LeGR-Pruning (Fig. 2), and the two baselines: norm-only and uniform."""

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from legr.files import UserError, number_of, read_json, tensor_of, write_json
from legr.graph import Graph, because, per_layer

FLOOR = 0.1  # a layer of n filters never loses more than floor(0.9·n) (CIFAR-10; 0.2 on ImageNet)...
MIN_WIDTH = 2  # ...and never ends with fewer than 2


def filter_norms(model: nn.Module, graph: Graph) -> list[Tensor]:
    """‖Θ_i‖², the squared L2 norm of each filter's weights: one float32 tensor [width] per layer, on the CPU.

    They are summed there and in one order, so that every device and memory format gives the same bits.
    """
    try:
        weights = [model.get_submodule(layer.name).weight.detach().cpu() for layer in graph.layers]
    except AttributeError as error:
        raise UserError(f"model is not the network that graph was traced from ({error})") from None
    norms = [w.contiguous().float().pow(2).sum(tuple(range(1, w.dim()))) for w in weights]
    per_layer(graph, norms, "model")
    for layer, norm in zip(graph.layers, norms, strict=True):
        if not norm.isfinite().all():
            raise UserError(f"layer {layer.name} has weights that are not finite numbers")
    return norms


@dataclass(frozen=True)
class Ranking:
    """The learned affine maps of Eq. 1: `scale` is α and `shift` is κ, one float per layer."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self):
        for name in ("scale", "shift"):
            values = tensor_of(getattr(self, name), f"ranking {name}").double()
            if values.dim() != 1 or not values.isfinite().all():
                raise UserError(f"ranking {name} is not one number per layer, or has one that is not a finite number")
            object.__setattr__(self, name, tuple(values.tolist()))
        if len(self.scale) != len(self.shift):
            raise UserError(
                f"ranking has {len(self.scale)} scales and {len(self.shift)} shifts; it must have one of each per layer"
            )

    @classmethod
    def norm_only(cls, layers: int) -> "Ranking":
        """α = 1, κ = 0 everywhere: filters compete by their norms alone."""
        return cls((1.0,) * layers, (0.0,) * layers)

    def scores(self, norms: Sequence[Tensor]) -> list[Tensor]:
        """Eq. 1, I_i = α_l ‖Θ_i‖² + κ_l: one float64 tensor [width] per layer."""
        if len(norms) != len(self.scale):
            raise UserError(f"ranking has {len(self.scale)} layers; this network has {len(norms)} prunable layers")
        norms = [tensor_of(norm, "norms").double() for norm in norms]
        return [a * n + k for a, k, n in zip(self.scale, self.shift, norms, strict=True)]

    def save(self, path: str | Path) -> None:
        write_json(path, {"scale": self.scale, "shift": self.shift})

    @classmethod
    def load(cls, path: str | Path) -> "Ranking":
        value = read_json(path, "ranking; learn it first (learn_ranking, or the ranking stage)")
        try:
            return cls(value["scale"], value["shift"])
        except (KeyError, TypeError, UserError) as error:
            wanted = "a JSON object with the lists of numbers 'scale' and 'shift'"
            raise UserError(f"ranking {path} is not {wanted}: {error}") from None


def select(
    graph: Graph,
    scores: Sequence[Tensor],
    target: float,
    *,
    cost: Callable[[list[Tensor]], float] | None = None,
    floor: float = FLOOR,
    keep: Collection[str] = (),
) -> list[Tensor]:
    """LeGR-Pruning (Fig. 2): drop units from the lowest score up until the cost first falls below the target.

    A unit's score is the sum of its filters' scores. A unit is passed over if a layer of it is at its floor.

    Args:
        scores: one tensor [width] per layer, as `Ranking.scores` gives.
        target: a fraction of the dense network's cost, in (0, 1].
        cost: takes masks as returned here and must not grow when filters go: `graph.flops` (None), `graph.params`,
            or a measured latency. It is called about log2(units) times.
        floor: the fraction of each layer that stays at least; see `FLOOR` and `MIN_WIDTH`.
        keep: names of layers that stay whole, with all that is coupled with them.

    Returns:
        One bool tensor [width] per layer, True for filters that stay.

    Raises:
        UserError: if the floors make the target unreachable; says the lowest reachable fraction.
    """
    score = _sum_over_units(graph, scores, "scores")
    if not 0 < number_of(target) <= 1:
        raise UserError(f"target is {target}; it must be a fraction of the dense network's cost, above 0 and at most 1")
    if not 0 <= number_of(floor) < 1:
        raise UserError(f"floor is {floor}; it must be at least 0 and below 1")
    if unknown := set(keep) - {layer.name for layer in graph.layers}:
        raise UserError(
            f"keep names {min(unknown)!r}; it must be a list of prunable layers, such as {[graph.layers[0].name]}"
        )

    target, floor = number_of(target), number_of(floor)
    dropped = _droppable(graph, np.argsort(score, kind="stable"), floor, keep)
    cost = cost or graph.flops

    def kept_after(count: int) -> list[Tensor]:
        kept = np.ones(graph.unit_count, bool)
        kept[dropped[:count]] = False
        return graph.masks(kept)

    if target == 1:
        return kept_after(0)
    dense, lowest = cost(kept_after(0)), cost(kept_after(len(dropped)))
    if lowest >= target * dense:
        lowest = min(math.ceil(1000 * lowest / dense + 1e-9) / 1000, 1.0)
        raise UserError(
            f"target is {target}; the lowest reachable fraction of this network is {lowest}{because(graph.whole)}"
        )
    # The cost only falls as units go, so the first count below the target is found by bisection.
    count = bisect_left(range(len(dropped)), True, key=lambda count: cost(kept_after(count)) < target * dense)
    return kept_after(count)


def select_uniform(graph: Graph, norms: Sequence[Tensor], target: float, **options: Any) -> list[Tensor]:
    """The uniform baseline: every layer loses the same fraction, its smallest-norm units first.

    `norms` are those of `filter_norms`; other arguments, result and errors are those of `select`.
    """
    norm, alike = _sum_over_units(graph, norms, "norms"), defaultdict(list)
    for unit, members in enumerate(graph.members):
        alike[tuple(members.items())].append(unit)
    share = np.empty(graph.unit_count)  # a unit's rank among those in the same layers: by it all layers thin alike
    for units in map(np.array, alike.values()):
        share[units[np.argsort(norm[units], kind="stable")]] = (np.arange(len(units)) + 0.5) / len(units)
    # As scores of filters: that of a unit's first filter is the unit's share, those of others are 0.
    filters = np.concatenate(graph.units)
    units, first = np.unique(filters, return_index=True)
    scores = np.zeros(len(filters))
    scores[first[units >= 0]] = share
    return select(graph, torch.from_numpy(scores).split(graph.widths), target, **options)


def _sum_over_units(graph: Graph, values: Sequence[Tensor], name: str) -> np.ndarray:
    """The sum over each unit's filters, float64 [units]."""
    summed = torch.cat(per_layer(graph, values, name)).numpy()
    if not np.isfinite(summed).all():
        raise UserError(f"{name} have a value that is not a finite number")
    return np.bincount(np.concatenate(graph.units) + 1, summed)[1:]  # the first one: of filters that must stay


def _droppable(graph: Graph, order: np.ndarray, floor: float, keep: Collection[str]) -> np.ndarray:
    """The units of `order` less those that would take a layer below its floor."""
    room = [
        0 if layer.name in keep else min(math.floor((1 - floor) * layer.width + 1e-9), layer.width - MIN_WIDTH)
        for layer in graph.layers
    ]
    droppable = []
    for unit in order.tolist():
        members = graph.members[unit].items()
        if all(room[layer] >= n for layer, n in members):
            for layer, n in members:
                room[layer] -= n
            droppable.append(unit)
    return np.array(droppable, np.int64)
