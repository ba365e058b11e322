"""What a network is made of, found by tracing it: prunable layers, coupled units, FLOPs.

Filters that can only be removed together, such as those of a residual stream, are a *unit* (elsewhere: a group of
coupled channels). legr/coupling.py finds them.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from legr.files import UserError, tensor_of

ADDED = "_added_by_trace"  # how names begin of what only the traced network has, `Flag` and `Function`


@dataclass(frozen=True)
class Layer:
    """A convolution whose filters can be pruned; a linear layer on feature maps [N, H, W, C] is a 1×1 convolution."""

    name: str  # the module's path in the network
    width: int  # its filters in the dense network


@dataclass(frozen=True)
class Operation:
    """A node of the traced network that surgery changes, with the units of its input and output channels."""

    node: str  # the node's name in the traced graph
    module: str | None  # the module's path; None for a function
    inputs: np.ndarray  # int64 [channels]: the unit of each, -1 if it must stay (while tracing, its label)
    outputs: np.ndarray
    flops_per_pair: int  # multiply-accumulates for one input channel and one output channel
    params_per_pair: int
    params_per_output: int


@dataclass
class Graph:
    """A traced network, made by `legr.trace`. `layers` are its prunable convolutions in execution order."""

    layers: list[Layer]
    operations: list[Operation]
    traced: fx.Graph
    units: list[np.ndarray]  # per layer int64 [width]: the unit of each filter, -1 if it must stay
    other_params: int  # parameters of modules that are not among the operations
    other_flops: int  # multiply-accumulates of all else
    whole: dict[str, str]  # modules with an operation whose inputs and outputs can't be pruned, and why
    inputs: tuple[int, ...] = ()  # channels, height and width that the network was traced with
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the network's parameters
    constants: dict[str, Any] = field(default_factory=dict)  # what the network has when it is traced alone, by its path
    frozen: frozenset[str] = frozenset()  # modules that stay in eval mode when the network is trained
    # Layers whose output is added or convolved before anything activates it: residual streams, linear bottlenecks.
    unactivated: tuple[str, ...] = ()
    members: list[dict[int, int]] = field(init=False)  # per unit: how many filters of which layer (by its index)

    def __post_init__(self):
        self._units = np.concatenate([*self.units, [-1]])  # of all filters, and of one more that stays
        self.members = [Counter() for _ in range(self._units.max() + 1)]
        for layer, units in enumerate(self.units):
            for unit in units[units >= 0].tolist():
                self.members[unit][layer] += 1
        # For counting: the units of all operations' input and output channels, one after the other.
        sides = [side for o in self.operations for side in (o.inputs, o.outputs)]
        assert all(map(len, sides)), "an operation without channels would get the count of the next one"
        self._sides, self._starts = np.concatenate(sides), [0, *accumulate(map(len, sides[:-1]))]
        per = [(o.flops_per_pair, o.params_per_pair, o.params_per_output) for o in self.operations]
        self._flops_per_pair, self._params_per_pair, self._params_per_output = np.array(per, np.int64).T

    @property
    def unit_count(self) -> int:
        return len(self.members)

    @property
    def widths(self) -> list[int]:
        return [layer.width for layer in self.layers]

    def flops(self, kept: Sequence[Tensor] | None = None) -> int:
        """Multiply-accumulates of one image's forward pass: convolutions, linear layers and matrix products.

        Args:
            kept: one bool tensor [width] per layer; None: the dense network.
        """
        inputs, outputs = self._channels(kept)
        return self.other_flops + int(self._flops_per_pair @ (inputs * outputs))

    def params(self, kept: Sequence[Tensor] | None = None) -> int:
        """Parameters of the network, all that are used. Arguments are those of `flops`."""
        inputs, outputs = self._channels(kept)
        return self.other_params + int(self._params_per_pair @ (inputs * outputs) + self._params_per_output @ outputs)

    def _channels(self, kept: Sequence[Tensor] | None) -> tuple[np.ndarray, np.ndarray]:
        """How many input and output channels of every operation stay, int64 [operations]."""
        stay = self.kept_channels(self.kept_units(kept), self._sides)
        counts = np.add.reduceat(stay, self._starts, dtype=np.int64)
        return counts[0::2], counts[1::2]

    def kept_units(self, kept: Sequence[Tensor] | None) -> np.ndarray:
        """Per-layer masks as one mask over units, bool [units].

        Raises:
            UserError: the masks are not of this network, or split a unit.
        """
        mask = np.ones(self.unit_count + 1, bool)  # the last one for filters that must stay
        if kept is None:
            return mask[:-1]
        stays = torch.cat([*per_layer(self, kept, "kept"), torch.ones(1)]).numpy()
        if not np.isin(stays, (0, 1)).all():
            raise UserError("kept has a value that is neither True nor False")
        stays = stays.astype(bool)
        mask[self._units[~stays]] = False
        mask[-1] = True
        if (split := mask[self._units] != stays).any():
            name = self.layers[np.searchsorted(np.cumsum(self.widths), split.argmax(), side="right")].name
            raise UserError(f"kept keeps only a part of some coupled filters in layer {name}; keep all of them or none")
        return mask[:-1]

    def masks(self, kept_units: np.ndarray) -> list[Tensor]:
        """One bool tensor [width] per layer from a mask over units."""
        return [torch.from_numpy(self.kept_channels(kept_units, units)) for units in self.units]

    def kept_channels(self, kept_units: np.ndarray, units: np.ndarray) -> np.ndarray:
        """Which of the channels of these units stay, bool, shaped as `units`; all of unit -1 do."""
        return np.append(kept_units, True)[units]


def because(whole: dict[str, str]) -> str:
    """Ends a message: what first stays whole."""
    first = [f", the first in module {name}: {why}" for name, why in whole.items()][:1]
    return f"; {len(whole)} modules stay whole (Graph.whole){first[0]}" if first else ""


def per_layer(graph: Graph, values: Sequence[Tensor], name: str) -> list[Tensor]:
    """`values` as one float64 tensor [width] on the CPU for each layer of `graph`; UserError where they are others."""
    if not hasattr(values, "__len__") or isinstance(values, dict | str):
        raise UserError(f"{name} is of type {type(values).__name__}; it must be a list with one tensor per layer")
    if len(values) != len(graph.layers):
        raise UserError(f"{name} has {len(values)} layers; this network has {len(graph.layers)} prunable layers")
    tensors = []
    for layer, value in zip(graph.layers, values, strict=True):
        tensors.append(tensor_of(value, f"{name} for layer {layer.name}").cpu().double())
        if (shape := list(tensors[-1].shape)) != [layer.width]:
            raise UserError(f"{name} for layer {layer.name} has shape {shape}; it must be [{layer.width}]")
    return tensors


# What a traced network is made of ----------------------------------------------------------


class Flag(nn.Module):
    """Gives whether it is in training mode: what a forward pass reads of its module, and torch.fx can't record."""

    def forward(self) -> bool:
        return self.training


class Function(nn.Module):
    """Calls a torch.autograd.Function, whose gradient torch.fx does not record."""

    def __init__(self, function: type):
        super().__init__()
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function.apply(*args, **kwargs)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by their names."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def reads(network: fx.GraphModule) -> Counter:
    """How many steps read each parameter and buffer, by its id."""
    parts = [attrgetter(n.target)(network) for n in network.graph.nodes if n.op in ("call_module", "get_attr")]
    tensors = [tensors_of(part).values() if isinstance(part, nn.Module) else [part] for part in parts]
    return Counter(id(tensor) for of_step in tensors for tensor in of_step)


def shapes_of(module: nn.Module) -> dict[str, Any]:
    """Of the parameters; what else a module has may come and go, such as a profiler's counters."""
    return {name: None if is_lazy(p) else tuple(p.shape) for name, p in module.named_parameters()}
