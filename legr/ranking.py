"""Eq. 1 and LeGR-Pruning (Fig. 2), and the two baselines: norm-only and uniform."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from legr.errors import UserError
from legr.files import write_json
from legr.graph import Graph, check_per_layer

MAX_PRUNED = 0.9  # a layer never loses more than floor(0.9 n) of its n filters...
MIN_WIDTH = 2  # ...and never ends with fewer than 2
LARGEST_FILE = 10_000_000  # bytes of a ranking; one of 1,000 layers has 40,000


def filter_norms(model: nn.Module, graph: Graph) -> list[Tensor]:
    """‖Θ_i‖², the squared L2 norm of each filter's weights: one float32 tensor [width] per layer."""
    weights = [model.get_submodule(layer.name).weight.detach().float() for layer in graph.layers]
    norms = [weight.pow(2).sum(tuple(range(1, weight.dim()))).cpu() for weight in weights]
    check_per_layer(graph, norms, "model")
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
            values = tuple(float(x) for x in getattr(self, name))
            if not all(map(math.isfinite, values)):
                raise UserError(f"ranking {name} has a value that is not a finite number")
            object.__setattr__(self, name, values)
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
        return [a * n.double() + k for a, k, n in zip(self.scale, self.shift, norms, strict=True)]

    def save(self, path: str | Path) -> None:
        write_json(path, {"scale": self.scale, "shift": self.shift})

    @classmethod
    def load(cls, path: str | Path) -> "Ranking":
        try:
            if (size := Path(path).stat().st_size) > LARGEST_FILE:
                raise UserError(f"ranking {path} has {size:,} bytes; a ranking has {LARGEST_FILE:,} at most")
            value = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(tuple(map(float, value["scale"])), tuple(map(float, value["shift"])))
        except UserError:
            raise
        except FileNotFoundError:
            raise UserError(f"ranking {path} does not exist; learn it first (the ranking stage)") from None
        except Exception:
            raise UserError(
                f"ranking {path} is not a JSON object with the lists of numbers 'scale' and 'shift'"
            ) from None


def check_fraction(name: str, value: float) -> None:
    if not (isinstance(value, int | float) and 0 < value <= 1):
        raise UserError(f"{name} is {value}; it must be a fraction of the dense network's, above 0 and at most 1")


def select(
    graph: Graph,
    scores: Sequence[Tensor],
    flops: float | None = None,
    *,
    params: float | None = None,
    latency: float | None = None,
    measure: Callable[[list[Tensor]], float] | None = None,
    round_to: int = 1,
) -> list[Tensor]:
    """LeGR-Pruning (Fig. 2): drop units from the lowest score up until FLOPs first fall below the target.

    A unit's score is the sum of its filters' importances. Units of a layer that has reached its
    floor are passed over.

    Args:
        scores: one tensor [width] per layer, as `Ranking.scores` gives.
        flops: target as a fraction of the dense network's, in (0, 1].
        params: a target for the parameters instead.
        latency: a target for the latency instead, as `measure` gives it.
        measure: the latency of the network with these masks, as a fraction of the dense network's; such as
            `latency.against_dense` makes. It is asked about ten times.
        round_to: units that are dropped alike stay in multiples of this many (or all): those on the way to the
            next multiple are kept. Processors compute channels by the vector, filled or not.

    Returns:
        One bool tensor [width] per layer, True for filters that stay.

    Raises:
        UserError: if the floors make the target unreachable; says the lowest reachable fraction.
    """
    budget = _Budget.of(graph, flops, params, latency, measure, round_to)
    check_per_layer(graph, scores, "scores")
    importance = np.zeros(graph.unit_count)
    for units, score in zip(graph.units, scores, strict=True):
        free = units >= 0
        np.add.at(importance, units[free], score.detach().cpu().double().numpy()[free])
    if not np.isfinite(importance).all():
        raise UserError("scores have a value that is not a finite number")
    return _drop_until(graph, np.argsort(importance, kind="stable"), budget)


@dataclass(frozen=True)
class _Budget:
    """What a network may cost: less than `fraction` of `dense`; `cost` takes units kept in each space, and masks."""

    name: str
    fraction: float
    dense: float
    cost: Callable[[np.ndarray, Callable[[], list[Tensor]]], float]
    round_to: int

    @classmethod
    def of(
        cls,
        graph: Graph,
        flops: float | None = None,
        params: float | None = None,
        latency: float | None = None,
        measure: Callable[[list[Tensor]], float] | None = None,
        round_to: int = 1,
    ) -> "_Budget":
        given = {k: v for k, v in {"flops": flops, "params": params, "latency": latency}.items() if v is not None}
        if len(given) != 1:
            raise UserError(f"{', '.join(given) or 'none'} of flops, params and latency is given; it must be just one")
        ((name, fraction),) = given.items()
        check_fraction(name, fraction)
        if (latency is None) != (measure is None):
            raise UserError("latency and measure belong together: a target, and what tells a network's latency")
        if not (isinstance(round_to, int) and round_to >= 1):
            raise UserError(f"round_to is {round_to}; it must be a whole number, at least 1")
        if measure is not None:
            return cls(name, fraction, 1.0, lambda _counts, masks: measure(masks()), round_to)
        if name == "params":
            return cls(name, fraction, graph.params(), lambda counts, _masks: graph.params_of_counts(counts), round_to)
        return cls(name, fraction, graph.flops(), lambda counts, _masks: graph.flops_of_counts(counts), round_to)


def _drop_until(graph: Graph, order: np.ndarray, budget: _Budget) -> list[Tensor]:
    """Drop units in `order`, as far as the floors allow, until the cost first falls below the budget."""
    room = [min(math.floor(MAX_PRUNED * n), n - MIN_WIDTH) for n in graph.widths]
    needs_of = [[(layer, int(n)) for layer, n in enumerate(row) if n] for row in graph.per_space]
    space = graph.space.tolist()
    droppable = []
    for unit in order.tolist():
        needs = needs_of[space[unit]]
        if all(room[layer] >= n for layer, n in needs):
            for layer, n in needs:
                room[layer] -= n
            droppable.append(unit)
    total = np.bincount(graph.space, minlength=len(graph.per_space))
    dropped_spaces = graph.space[droppable]
    place = _place_within(dropped_spaces)

    def counts_after(count: int) -> np.ndarray:
        kept = total - np.bincount(dropped_spaces[:count], minlength=len(total))
        return np.minimum(-(-kept // budget.round_to) * budget.round_to, total)

    def masks_after(count: int) -> list[Tensor]:
        gone = (total - counts_after(count))[dropped_spaces[:count]]
        kept = np.ones(graph.unit_count, bool)
        kept[np.array(droppable, np.int64)[:count][place[:count] < gone]] = False
        return graph.masks(kept)

    def cost_after(count: int) -> float:
        return budget.cost(counts_after(count), lambda: masks_after(count))

    # The cost only falls as units go, so the first count below the budget is found by bisection.
    if budget.fraction == 1:
        return masks_after(0)
    limit = budget.fraction * budget.dense
    if (lowest := cost_after(len(droppable))) >= limit:
        lowest = min(math.ceil(1000 * lowest / budget.dense + 1e-9) / 1000, 1.0)
        raise UserError(
            f"{budget.name} is {budget.fraction}; the lowest reachable fraction of this network is {lowest}"
        )
    low, high = 0, len(droppable)
    while low < high:
        middle = (low + high) // 2
        if cost_after(middle) < limit:
            high = middle
        else:
            low = middle + 1
    return masks_after(low)


def _place_within(groups: np.ndarray) -> np.ndarray:
    """How many before it are of the same group: int [n]."""
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    place = np.empty(len(groups), np.int64)
    place[order] = np.arange(len(groups)) - (np.cumsum(sizes) - sizes)[groups[order]]
    return place


def select_uniform(graph: Graph, norms: Sequence[Tensor], flops: float | None = None, **budget: Any) -> list[Tensor]:
    """The uniform baseline: every layer loses the same fraction, its smallest-norm units first.

    Arguments, result and errors are those of `select`; `norms` are those of `filter_norms`.
    """
    limits = _Budget.of(graph, flops, **budget)
    check_per_layer(graph, norms, "norms")
    norm = np.zeros(graph.unit_count)
    for units, value in zip(graph.units, norms, strict=True):
        free = units >= 0
        np.add.at(norm, units[free], value.detach().cpu().double().numpy()[free])
    # Rank within each space as a fraction of its size: dropping by it thins all layers alike.
    order = np.lexsort((norm, graph.space))
    fraction = np.empty(graph.unit_count)
    fraction[order] = (_place_within(graph.space[order]) + 0.5) / np.bincount(graph.space)[graph.space[order]]
    return _drop_until(graph, np.argsort(fraction, kind="stable"), limits)


def select_by(
    method: str, graph: Graph, norms: Sequence[Tensor], ranking: Ranking | None, flops: float, round_to: int = 1
) -> list[Tensor]:
    """The selection that a method's name stands for: `uniform`, `norm`, or a learned ranking."""
    if method == "uniform":
        return select_uniform(graph, norms, flops, round_to=round_to)
    ranking = Ranking.norm_only(len(graph.layers)) if method == "norm" else ranking
    if ranking is None:
        raise UserError(f"method is {method!r}; it needs a learned ranking (only norm and uniform do without)")
    return select(graph, ranking.scores(norms), flops, round_to=round_to)


def random_ranking(norms: Sequence[Tensor], generator: np.random.Generator) -> Ranking:
    """A random candidate of Algorithm 1: α = exp(N(0, 1)), κ = N(0, s_l), s_l the deviation of layer l's norms."""
    deviations = norm_deviations(norms)
    return Ranking(
        tuple(np.exp(generator.normal(0, 1, len(deviations)))),
        tuple(generator.normal(0, 1, len(deviations)) * deviations),
    )


def norm_deviations(norms: Sequence[Tensor]) -> np.ndarray:
    """s_l: standard deviation of each layer's filter norms, float64 [layers]."""
    return np.array([torch.std(n.double(), correction=0).item() for n in norms])
