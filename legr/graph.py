"""What a network is made of, found by tracing it: prunable layers, coupled units, FLOPs.

Every channel of every feature map carries a *label*, a whole number. A convolution gives its filters new
labels; other operations pass labels on, or *join* the labels of channels that can only be dropped together.
Channels joined with the label `FIXED` (the input's, the output's) stay. Filters that have the same label in
the end are one *unit*. Example, a residual block of two channels:

    operation                     labels            afterwards
    x          3 input channels   0 0 0             FIXED
    a = conv1(x)                  1 2
    b = conv2(a)                  3 4
    c = a + conv3(b)              5 6 joined 1 2    1 2
    linear(c.mean((2, 3)))        outputs 0 … 0     FIXED

Layers: conv1, conv2 and conv3. Units: {conv1[0], conv3[0]}, {conv1[1], conv3[1]}, {conv2[0]}, {conv2[1]}.
With n of the first two units kept and m of the last two, 3×3 kernels on P pixels and K classes:
FLOPs = 9·P·(3·n + n·m + m·n) + n·K.
"""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from legr.files import UserError

FIXED = 0  # the label of channels that must stay
Labels = Tensor  # int64 [channels]


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
    """A traced network. `layers` are its prunable convolutions in execution order."""

    layers: list[Layer]
    operations: list[Operation]
    traced: fx.Graph
    units: list[np.ndarray]  # per layer int64 [width]: the unit of each filter, -1 if it must stay
    other_params: int  # parameters of modules that are not among the operations
    members: list[dict[int, int]] = field(init=False)  # per unit: how many filters of which layer (by its index)

    def __post_init__(self):
        self._units = np.concatenate([*self.units, [-1]])  # of all filters, and of one more that stays
        self.members = [Counter() for _ in range(self._units.max() + 1)]
        for layer, units in enumerate(self.units):
            for unit in units[units >= 0].tolist():
                self.members[unit][layer] += 1
        # For counting: the units of all operations' input and output channels, one after the other.
        sides = [side for o in self.operations for side in (o.inputs, o.outputs)]
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
        """Multiply-accumulates of one image's forward pass: convolutions and linear layers.

        Args:
            kept: one bool tensor [width] per layer; None: the dense network.
        """
        inputs, outputs = self._channels(kept)
        return int(self._flops_per_pair @ (inputs * outputs))

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
        check_per_layer(self, kept, "kept")
        stays = torch.cat([*map(Tensor.cpu, kept), torch.tensor([True])]).numpy()
        mask[self._units[~stays]] = False
        mask[-1] = True
        if (split := mask[self._units] != stays).any():
            name = self.layers[np.searchsorted(np.cumsum(self.widths), split.argmax(), side="right")].name
            raise UserError(f"kept keeps only a part of some coupled filters in layer {name}; keep all of them or none")
        return mask[:-1]

    def masks(self, kept_units: np.ndarray) -> list[Tensor]:
        """One bool tensor [width] per layer from a mask over units."""
        stays = np.append(kept_units, True)
        return [torch.from_numpy(stays[units]) for units in self.units]

    def kept_channels(self, kept_units: np.ndarray, units: np.ndarray) -> np.ndarray:
        """Which of the channels of these units stay, bool, shaped as `units`; all of unit -1 do."""
        return np.append(kept_units, True)[units]


def check_per_layer(graph: Graph, values: Sequence[Tensor], name: str) -> None:
    """Raise UserError unless `values` has one tensor [width] for each layer of `graph`."""
    if not graph.layers:
        raise UserError("this network has no layers that can be pruned")
    if len(values) != len(graph.layers):
        raise UserError(f"{name} has {len(values)} layers; this network has {len(graph.layers)} prunable layers")
    for layer, value in zip(graph.layers, values, strict=True):
        if tuple(value.shape) != (layer.width,):
            raise UserError(f"{name} for layer {layer.name} has shape {list(value.shape)}; it must be [{layer.width}]")


def trace(model: nn.Module, example_input: Tensor) -> Graph:
    """Find a network's prunable layers, coupled units and FLOPs. The network is left alone.

    Args:
        model: a convolutional classifier that torch.fx can trace.
        example_input: [1, channels, height, width], for the shapes; its values do not matter.

    Raises:
        UserError: names the operation and the module that can't be traced.
    """
    quiet, tracer = copy.deepcopy(model).eval(), fx.Tracer()
    try:
        traced = tracer.trace(quiet)
    except Exception as error:
        where = next(reversed(tracer.module_stack), "(the network itself)")
        raise UserError(f"module {where} can't be traced by torch.fx: {str(error).splitlines()[0]}") from None
    try:
        with torch.inference_mode():
            device = next(quiet.parameters()).device
            ShapeProp(fx.GraphModule(quiet, traced)).propagate(example_input.to(device))
    except RuntimeError as error:
        given = f"example_input of shape {list(example_input.shape)}"
        raise UserError(f"{given} does not fit the network: {str(error).splitlines()[0]}") from None
    return _Labeller(fx.GraphModule(quiet, traced)).labelled()


class _Labeller(fx.Interpreter):
    """Runs the traced network on labels: int64 tensors with the shapes of the feature maps.

    `RULES` says what an operation does to them. What only moves numbers is run as it is. Feature maps have equal
    labels over height and width, kept as expanded tensors [N, C, 1, 1], so that they take no memory.
    """

    def __init__(self, network: fx.GraphModule):
        super().__init__(network, garbage_collect_values=False)
        self.extra_traceback = False  # a refusal is one sentence
        self.labels = FIXED + 1  # how many there are
        self.joined: list[Tensor] = []  # int64 [2, pairs] each: labels that are dropped together or not at all
        self.operations: list[Operation] = []

    def labelled(self) -> Graph:
        self.run(*[None for node in self.module.graph.nodes if node.op == "placeholder"])
        pairs = torch.cat([torch.empty(2, 0, dtype=torch.int64), *self.joined], 1).numpy()
        links = coo_array((np.ones(pairs.shape[1]), pairs), shape=(self.labels, self.labels))
        group = connected_components(links, directed=False)[1]  # of each label; labels of a group are joined
        layers = [o for o in self.operations if o.flops_per_pair and (group[o.outputs] != group[FIXED]).any()]
        # Units are numbered by their first filter, which settles equal scores.
        free = dict.fromkeys(g for o in layers for g in group[o.outputs].tolist() if g != group[FIXED])
        unit_of_group = np.full(len(group), -1)
        unit_of_group[list(free)] = np.arange(len(free))
        unit = unit_of_group[group]
        within = {f"{o.module}.{name}" for o in self.operations if o.module for name in ("weight", "bias")}
        return Graph(
            layers=[Layer(o.module, len(o.outputs)) for o in layers],
            operations=[replace(o, inputs=unit[o.inputs], outputs=unit[o.outputs]) for o in self.operations],
            traced=self.module.graph,
            units=[unit[o.outputs] for o in layers],
            # torch.fx drops parameters that are not used.
            other_params=sum(p.numel() for name, p in self.module.named_parameters() if name not in within),
        )

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op in ("placeholder", "get_attr"):  # a parameter is not cut: what it is combined with isn't either
            return torch.full(self.shape(), FIXED)
        if n.op == "output":
            for source in n.all_input_nodes:
                self.fix(self.env[source])
            return None
        if not any(isinstance(self.env[source], Tensor) for source in n.all_input_nodes):
            return super().run_node(n)  # arithmetic with sizes
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        return self.rule()(self, *args, **kwargs)

    def rule(self) -> "Rule":
        """Modules are known by their type, functions and methods by their name."""
        name, home = self.node.target, "torch"
        if self.node.op == "call_module":
            name = type(self.layer)
        elif self.node.op == "call_function":
            name, home = name.__name__, str(name.__module__).partition(".")[0]
        if name not in RULES or home not in ("torch", "torchvision", "_operator", "builtins"):
            raise self.refused("the operation is not supported")
        return RULES[name]

    # What rules ask about and do ----------------------------------------------------------
    @property
    def layer(self) -> nn.Module:
        """The module that the current node calls."""
        return self.module.get_submodule(str(self.node.target))

    def shape(self) -> tuple[int, ...]:
        """Of the current node's result."""
        meta = self.node.meta.get("tensor_meta")
        if not hasattr(meta, "shape"):
            raise self.refused("it does not return one tensor")
        return tuple(meta.shape)

    def channels(self, x: Tensor, axis: int = 1) -> Labels:
        """The labels along dimension `axis`, which must not change along the others."""
        rows = _without_repetition(x.movedim(axis, -1))[0].reshape(-1, x.shape[axis])
        if x.dim() < 2 or (rows != rows[0]).any():
            raise self.refused("it is applied to feature maps with their channels in another dimension")
        return rows[0]

    def map_of(self, labels: Labels) -> Tensor:
        """A feature map [N, C, …] of the current node's shape with these channels."""
        shape = self.shape()
        return labels.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)

    def new(self, count: int) -> Labels:
        self.labels += count
        return torch.arange(self.labels - count, self.labels)

    def join(self, left: Tensor, right: Tensor) -> None:
        """Channels at the same place are dropped together or not at all."""
        left, right = _without_repetition(left, right)
        self.joined.append(torch.stack([left.flatten(), right.flatten()]))

    def fix(self, x: Tensor) -> None:
        self.join(x, torch.tensor(FIXED).expand(x.shape))

    def operation(self, inputs: Labels, outputs: Labels) -> None:
        """Note what surgery must know of the current node. Multiply-accumulates follow from the weights' shape."""
        module = str(self.node.target) if self.node.op == "call_module" else None
        if module and any(o.module == module for o in self.operations):
            raise self.refused("the module is used twice, so its weights can't be pruned")
        parameters = list(self.layer.parameters()) if module else []
        kernel = sum(p[0, 0].numel() for p in parameters if p.dim() > 1)
        positions = prod(self.shape()[1:]) // len(outputs)
        counts = (kernel * positions, kernel, sum(p.dim() == 1 for p in parameters))
        self.operations.append(Operation(self.node.name, module, inputs.numpy(), outputs.numpy(), *counts))

    def refused(self, why: str) -> UserError:
        what = getattr(self.node.target, "__name__", str(self.node.target))
        owner = next(reversed(self.node.meta.get("nn_module_stack") or {}), "(the network itself)")
        if self.node.op == "call_module":
            what, owner = type(self.layer).__name__, str(self.node.target)
        return UserError(f"operation {what} in module {owner} can't be pruned: {why}")


def _without_repetition(*tensors: Tensor) -> list[Tensor]:
    """The same without the dimensions along which all of them are expanded (equal shapes)."""
    for dim in range(tensors[0].dim()):
        if all(x.stride(dim) == 0 for x in tensors):
            tensors = tuple(x.narrow(dim, 0, 1) for x in tensors)
    return list(tensors)


# Rules: what an operation does to the labels of its inputs, given the operation's own arguments.
Rule = Callable[..., Any]


def _convolution(net: _Labeller, x: Tensor) -> Tensor:
    conv, inputs, outputs = net.layer, net.channels(x), net.new(net.layer.out_channels)
    if conv.groups == 1:
        read = inputs
    elif conv.groups == conv.in_channels == conv.out_channels:  # depthwise: input and output channel are one unit
        net.join(inputs, outputs)
        read = torch.tensor([FIXED])  # each filter reads one channel, whatever is kept
    else:  # other grouped convolutions stay whole
        net.fix(torch.cat([inputs, outputs]))
        read = torch.full((conv.in_channels // conv.groups,), FIXED)
    net.operation(read, outputs)
    return net.map_of(outputs)


def _linear(net: _Labeller, x: Tensor) -> Tensor:
    """A classifier, whose outputs stay; on [N, H, W, C] a 1×1 convolution."""
    count, inputs, shape = net.layer.out_features, net.channels(x, axis=-1), net.shape()
    if len(shape) not in (2, 4):
        raise net.refused("a linear layer must follow a flatten")
    outputs = net.new(count) if len(shape) == 4 else torch.full((count,), FIXED)
    net.operation(inputs, outputs)
    return outputs.expand(shape)


def _batch_norm(net: _Labeller, x: Tensor) -> Tensor:
    labels = net.channels(x)
    net.operation(labels, labels)
    return x


def _layer_norm(net: _Labeller, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Its mean and variance are over all channels, so none of them can go."""
    net.fix(x)
    return x


def _pointwise(net: _Labeller, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _pooling(net: _Labeller, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return net.map_of(net.channels(x))


def _joining(net: _Labeller, x: Tensor, other: Any, **_: Any) -> Tensor:
    """An elementwise operation on two tensors, or on one and a number."""
    if not isinstance(x, Tensor) or not isinstance(other, Tensor):
        return x if isinstance(x, Tensor) else other
    x, other = torch.broadcast_tensors(x, other)
    net.join(x, other)
    return x


def _mean(net: _Labeller, x: Tensor, dim: int | Sequence[int] = (), keepdim: bool = False, **_: Any) -> Tensor:
    dims = {d % x.dim() for d in ([dim] if isinstance(dim, int) else dim)}
    if x.dim() != 4 or dims != {2, 3}:
        raise net.refused("only the mean over height and width is supported")
    return net.map_of(net.channels(x))


def _pad(net: _Labeller, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    front, back, *more = [*pad[4:], 0, 0]
    if any(more) or front < 0 or back < 0 or ((front or back) and (mode != "constant" or value)):
        raise net.refused("channels can only be padded with zeros")
    inputs = net.channels(x)
    if front or back:
        # A zero channel lives as long as what it is later joined with.
        inputs = torch.cat([net.new(front), inputs, net.new(back)])
        net.operation(inputs[front : len(inputs) - back], inputs)
    return net.map_of(inputs)


def _moving(net: _Labeller, *args: Any, **kwargs: Any) -> Any:
    """What only moves channels, whatever their number, moves the labels."""
    return fx.Interpreter.run_node(net, net.node)


def _reshape(net: _Labeller, x: Tensor, *size: Any) -> Tensor:
    result = _moving(net)
    if result.dim() != 2 or net.node.args[-1] != -1 or result.shape[0] != x.shape[0]:
        raise net.refused("only flattening to [N, features] is supported, as flatten(1) or view(N, -1)")
    return result


def _slice(net: _Labeller, x: Tensor, index: Any) -> Tensor:
    index = index if isinstance(index, tuple) else (index,)
    if any(i != slice(None) for i in index[:2]) or not all(isinstance(i, slice) for i in index):
        raise net.refused("only slices of height and width are supported")
    return net.map_of(net.channels(x))


def _attribute(net: _Labeller, x: Tensor, name: str) -> Any:
    if name != "shape":
        raise net.refused("the operation is not supported")
    return x.shape


POINTWISE = [
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Hardswish,
    nn.Hardsigmoid, nn.Dropout, nn.Dropout2d, nn.Identity,
    "relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "mish", "elu", "sigmoid", "tanh", "hardswish",
    "hardsigmoid", "dropout", "dropout2d", "stochastic_depth", "contiguous", "float", "clone",
]  # fmt: skip
POOLING = [
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
]  # fmt: skip
JOINING = ["add", "add_", "iadd", "mul", "mul_", "imul"]
MOVING = [nn.Flatten, "flatten", "permute", "cat", "size", "dim"]
RULES: dict[type | str, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise), **dict.fromkeys(POOLING, _pooling), **dict.fromkeys(JOINING, _joining),
    **dict.fromkeys(MOVING, _moving), "view": _reshape, "reshape": _reshape, "getitem": _slice, "getattr": _attribute,
    nn.Conv2d: _convolution, nn.Linear: _linear, nn.BatchNorm2d: _batch_norm, nn.LayerNorm: _layer_norm,
    "layer_norm": _layer_norm, "mean": _mean, "pad": _pad,
}  # fmt: skip
