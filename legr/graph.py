"""What a network is made of, found by tracing it: prunable layers, coupled units, FLOPs.

Every tensor carries one label per channel. Operations pass labels on, and those that force two
channels to live or die together (a residual add, a depthwise convolution) join their labels.
What is joined in the end is one *unit*; labels joined with `FIXED` (the input's, the output's)
can't be pruned. Nothing here knows an architecture.
"""

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from legr.errors import UserError

FIXED = 0  # the label of channels that must stay
Labels = np.ndarray  # int64 [channels]; [features] after a flatten

# Operations that treat every channel alike and keep the channels' order.
POINTWISE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.Sigmoid, nn.Tanh,
    nn.Hardswish, nn.Hardsigmoid, nn.Dropout, nn.Dropout2d, nn.Identity,
)  # fmt: skip
CHANNELWISE_MODULES = (
    *POINTWISE_MODULES, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d,
)  # fmt: skip
POINTWISE_FUNCTIONS = {
    torch.relu, F.relu, F.relu6, F.leaky_relu, F.gelu, F.silu, F.mish, F.elu, F.hardswish, F.hardsigmoid,
    torch.sigmoid, torch.tanh, F.dropout, F.dropout2d,
}  # fmt: skip
TORCHVISIONS = {"stochastic_depth"}  # pointwise too; by name, for importing torchvision takes seconds
CHANNELWISE_FUNCTIONS = POINTWISE_FUNCTIONS | {
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d,
}  # fmt: skip
CHANNELWISE_METHODS = {"relu", "relu_", "sigmoid", "tanh", "contiguous", "float", "clone"}
# Elementwise operations on two tensors: both sides' channels live and die together.
JOINING = {operator.add, operator.iadd, torch.add, operator.mul, operator.imul, torch.mul, "add", "add_", "mul", "mul_"}
SIZES = {"size", "dim"}
CHANNELS_LAST, CHANNELS_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # permutations of [N, C, H, W] and back


@dataclass(frozen=True)
class Layer:
    """A convolution whose filters can be pruned; a linear layer on feature maps [N, H, W, C] is one, of size 1×1."""

    name: str  # the module's path in the network
    width: int  # its filters in the dense network


@dataclass(frozen=True)
class Operation:
    """A node of the traced network that surgery changes, with the labels of its channels."""

    node: str  # the node's name in the traced graph
    module: str | None  # the module's path; None for a function
    inputs: Labels
    outputs: Labels
    flops_per_pair: int = 0  # multiply-accumulates for one input channel and one output channel
    params_per_pair: int = 0
    params_per_output: int = 0


@dataclass
class Graph:
    """A traced network. `layers` are its prunable convolutions in execution order."""

    layers: list[Layer]
    operations: list[Operation]
    traced: fx.Graph
    modules: frozenset[str]  # paths of all modules that the traced network calls
    filters: list[Labels]  # per layer [width]: the label of each filter
    whole_params: int = 0  # parameters that no pruning touches
    units: list[np.ndarray] = field(init=False)  # per layer [width]: unit of each filter, -1 if it must stay
    unit_count: int = field(init=False)

    def __post_init__(self):
        # Units are numbered by their first filter, which settles equal scores.
        labels = np.concatenate(self.filters) if self.filters else np.empty(0, np.int64)
        free, first = np.unique(labels[labels != FIXED], return_index=True)
        number = dict(zip(free[np.argsort(first)].tolist(), range(len(free)), strict=True))
        self.unit_count = len(number)
        self.units = [np.array([number.get(x, -1) for x in f.tolist()], np.int64) for f in self.filters]

        # FLOPs and parameters are sums of products of channel counts. Units that count alike form one space.
        self._unit_of_label = number
        counted = [o for o in self.operations if o.module is not None]
        sides = [(self._units_of(o.inputs), self._units_of(o.outputs)) for o in counted]
        self._flops_per_pair = np.array([o.flops_per_pair for o in counted], np.int64)
        self._params_per_pair = np.array([o.params_per_pair for o in counted], np.int64)
        self._params_per_output = np.array([o.params_per_output for o in counted], np.int64)
        columns = [np.bincount(u[u >= 0], minlength=self.unit_count) for pair in sides for u in pair]
        columns += [np.bincount(u[u >= 0], minlength=self.unit_count) for u in self.units]
        table = np.stack(columns, 1) if columns else np.zeros((self.unit_count, 0), np.int64)
        spaces, space = np.unique(table, axis=0, return_inverse=True)
        self.space = space.reshape(-1)  # [units]
        self.per_space = spaces[:, 2 * len(sides) :]  # [spaces, layers]: filters of a layer in one unit
        self._channels = spaces[:, : 2 * len(sides)]  # [spaces, 2 × operations]: channels in one unit
        self._always = np.array([(u < 0).sum() for pair in sides for u in pair], np.int64)

    def _units_of(self, labels: Labels) -> np.ndarray:
        return np.array([self._unit_of_label.get(x, -1) for x in labels.tolist()], np.int64)

    def flops_of_counts(self, counts: np.ndarray) -> int:
        """FLOPs when counts[s] units are kept in space s."""
        channels = self._always + counts @ self._channels
        return int((self._flops_per_pair * channels[0::2] * channels[1::2]).sum())

    def params_of_counts(self, counts: np.ndarray) -> int:
        """Parameters when counts[s] units are kept in space s."""
        channels = self._always + counts @ self._channels
        inputs, outputs = channels[0::2], channels[1::2]
        cut = (self._params_per_pair * inputs * outputs + self._params_per_output * outputs).sum()
        return int(cut) + self.whole_params

    def kept_units(self, kept: Sequence[Tensor] | None) -> np.ndarray:
        """Per-layer masks as one mask over units; UserError if they are not a selection of this network."""
        mask = np.ones(self.unit_count, bool)
        if kept is None:
            return mask
        check_per_layer(self, kept, "kept")
        for units, keep in zip(self.units, kept, strict=True):
            mask[units[units >= 0]] &= keep.cpu().numpy()[units >= 0]
        for layer, units, keep in zip(self.layers, self.units, kept, strict=True):
            if (np.where(units >= 0, mask[units], True) != keep.cpu().numpy()).any():
                raise UserError(
                    f"kept keeps only a part of some coupled filters in layer {layer.name}; keep all of them or none"
                )
        return mask

    def masks(self, kept_units: np.ndarray) -> list[Tensor]:
        """One bool tensor [width] per layer from a mask over units."""
        return [torch.from_numpy(np.where(u >= 0, kept_units[u], True)) for u in self.units]

    def kept_channels(self, kept_units: np.ndarray, labels: Labels) -> np.ndarray:
        """Which of the labelled channels stay: bool, shaped as `labels`."""
        units = self._units_of(labels)
        return np.where(units >= 0, kept_units[units], True)

    def flops(self, kept: Sequence[Tensor] | None = None) -> int:
        """Multiply-accumulates of one image's forward pass: convolutions and linear layers."""
        return self.flops_of_counts(np.bincount(self.space[self.kept_units(kept)], minlength=len(self.per_space)))

    def params(self, kept: Sequence[Tensor] | None = None) -> int:
        """Parameters of the network, all that are used."""
        return self.params_of_counts(np.bincount(self.space[self.kept_units(kept)], minlength=len(self.per_space)))

    @property
    def widths(self) -> list[int]:
        return [layer.width for layer in self.layers]


def check_per_layer(graph: Graph, values: Sequence[Tensor], name: str) -> None:
    """Raise UserError unless `values` has one tensor [width] for each layer of `graph`."""
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
    quiet, tracer = copy.deepcopy(model).eval(), _Tracer()
    try:
        traced = tracer.trace(quiet)
    except Exception as error:
        where = tracer.failed or "(the network itself)"
        raise UserError(f"module {where} can't be traced by torch.fx: {str(error).splitlines()[0]}") from None
    try:
        with torch.inference_mode():
            device = next(quiet.parameters()).device
            ShapeProp(fx.GraphModule(quiet, traced)).propagate(example_input.to(device))
    except RuntimeError as error:
        shape = list(example_input.shape)
        raise UserError(
            f"example_input of shape {shape} does not fit the network: {str(error).splitlines()[0]}"
        ) from None
    return _Labeller(quiet, traced).graph()


class _Tracer(fx.Tracer):
    """Remembers in which module tracing failed."""

    failed: str | None = None

    def call_module(self, m, forward, args, kwargs):
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise


class _Labeller:
    """Walks the traced network once, passing labels along and joining them."""

    def __init__(self, model: nn.Module, traced: fx.Graph):
        self.modules = dict(model.named_modules())
        self.traced = traced
        self.parent = [FIXED]
        self.labels: dict[fx.Node, Labels] = {}
        self.operations: list[Operation] = []
        self.called: set[str] = set()
        self.last: set[fx.Node] = set()  # feature maps with their channels in the last dimension
        self.parameters: dict[fx.Node, Tensor] = {}

    def graph(self) -> Graph:
        for node in self.traced.nodes:
            visit: Callable[[fx.Node], None] = getattr(self, node.op)
            visit(node)
        resolve = np.array([self.find(x) for x in range(len(self.parent))])
        done = [replace(o, inputs=resolve[o.inputs], outputs=resolve[o.outputs]) for o in self.operations]
        filtering = [o for o in done if isinstance(self.modules.get(o.module or ""), nn.Conv2d | nn.Linear)]
        layers = [o for o in filtering if (o.outputs != FIXED).any()]
        used = {str(node.target): p for node, p in self.parameters.items() if isinstance(p, nn.Parameter)}
        whole = [m for name in self.called if isinstance(m := self.modules[name], nn.LayerNorm)]
        return Graph(
            [Layer(o.module, len(o.outputs)) for o in layers],
            done,
            self.traced,
            frozenset(self.called),
            [o.outputs for o in layers],
            sum(p.numel() for p in [*used.values(), *(p for m in whole for p in m.parameters())]),
        )

    # Labels -------------------------------------------------------------------------------
    def new(self, count: int) -> Labels:
        start = len(self.parent)
        self.parent += range(start, start + count)
        return np.arange(start, start + count)

    def find(self, label: int) -> int:
        while self.parent[label] != label:
            self.parent[label] = self.parent[self.parent[label]]
            label = self.parent[label]
        return label

    def join(self, node: fx.Node, left: Labels, right: Labels) -> None:
        if len(left) != len(right):
            raise self.refused(node, f"it joins {len(left)} channels with {len(right)}")
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            a, b = sorted((self.find(a), self.find(b)))
            self.parent[b] = a  # the smaller is the root, so FIXED always wins

    def fix(self, node: fx.Node, labels: Labels) -> None:
        self.join(node, labels, np.full(len(labels), FIXED))

    # Nodes --------------------------------------------------------------------------------
    def placeholder(self, node: fx.Node) -> None:
        self.labels[node] = np.full(self.shape(node)[1], FIXED)

    def output(self, node: fx.Node) -> None:
        for source in node.all_input_nodes:
            self.fix(node, self.of(node, source, last=True))

    def get_attr(self, node: fx.Node) -> None:
        owner, _, name = str(node.target).rpartition(".")
        self.parameters[node] = getattr(self.modules[owner], name)

    def call_module(self, node: fx.Node) -> None:
        name, module = str(node.target), self.modules[str(node.target)]
        if name in self.called and next(module.parameters(), None) is not None:
            raise self.refused(node, "the module is used twice, so its weights can't be pruned")
        self.called.add(name)
        pointwise = isinstance(module, (*POINTWISE_MODULES, nn.LayerNorm, nn.Linear))
        inputs = self.of(node, node.args[0], last=pointwise)
        if isinstance(module, nn.Conv2d):
            area = prod(module.kernel_size) * prod(self.shape(node)[2:])
            depthwise = module.groups == module.in_channels == module.out_channels
            if depthwise and module.groups > 1:
                outputs = self.new(module.out_channels)
                self.join(node, inputs, outputs)
                pairs = np.array([FIXED])  # each filter reads one channel, whatever is kept
            elif module.groups == 1:
                outputs, pairs = self.new(module.out_channels), inputs
            else:  # other grouped convolutions stay whole
                self.fix(node, inputs)
                outputs, pairs = (
                    np.full(module.out_channels, FIXED),
                    np.full(module.in_channels // module.groups, FIXED),
                )
            bias = int(module.bias is not None)
            self.operations.append(Operation(node.name, name, pairs, outputs, area, prod(module.kernel_size), bias))
            self.labels[node] = outputs
        elif isinstance(module, nn.Linear) and node.args[0] in self.last:  # a 1×1 convolution
            outputs, area = self.new(module.out_features), prod(self.shape(node)[1:3])
            bias = int(module.bias is not None)
            self.operations.append(Operation(node.name, name, inputs, outputs, area, 1, bias))
            self.labels[node] = outputs
            self.last.add(node)
        elif isinstance(module, nn.LayerNorm):
            self.layer_norm(node, module.normalized_shape)
        elif isinstance(module, nn.Linear):
            if len(self.shape(node)) != 2:
                raise self.refused(node, "a linear layer must follow a flatten")
            outputs = np.full(module.out_features, FIXED)
            self.operations.append(Operation(node.name, name, inputs, outputs, 1, 1, int(module.bias is not None)))
            self.labels[node] = outputs
        elif isinstance(module, nn.Flatten):
            self.flatten(node, module.start_dim)
        elif isinstance(module, CHANNELWISE_MODULES):
            if isinstance(module, nn.BatchNorm2d):
                self.operations.append(Operation(node.name, name, inputs, inputs, 0, 0, 2 * int(module.affine)))
            self.like(node, node.args[0])
        else:
            raise self.refused(node, "the module type is not supported")

    def call_function(self, node: fx.Node) -> None:
        function = node.target
        if function in JOINING:
            self.joining(node)
        elif function in POINTWISE_FUNCTIONS or getattr(function, "__name__", "") in TORCHVISIONS:
            self.like(node, node.args[0])
        elif function in CHANNELWISE_FUNCTIONS:
            self.labels[node] = self.of(node, node.args[0])
        elif function is torch.permute:
            self.permute(node, self.argument(node, 1, "dims", ()))
        elif function is F.layer_norm:
            self.layer_norm(node, self.argument(node, 1, "normalized_shape", ()))
        elif function is torch.flatten:
            self.flatten(node, self.argument(node, 1, "start_dim", 0))
        elif function is torch.cat:
            if self.argument(node, 1, "dim", 0) not in (1, 1 - len(self.shape(node))):
                raise self.refused(node, "only concatenation of channels (dim=1) is supported")
            self.labels[node] = np.concatenate([self.of(node, x) for x in node.args[0]])
        elif function is torch.mean:
            self.mean(node)
        elif function is F.pad:
            self.pad(node)
        elif function is operator.getitem:
            self.getitem(node)
        elif function is getattr and node.args[1] == "shape":
            pass  # a size, not a tensor
        else:
            raise self.refused(node, "the operation is not supported")

    def call_method(self, node: fx.Node) -> None:
        if node.target in JOINING:
            self.joining(node)
        elif node.target in CHANNELWISE_METHODS:
            self.labels[node] = self.of(node, node.args[0])
        elif node.target == "permute":
            self.permute(node, node.args[1] if isinstance(node.args[1], tuple | list) else node.args[1:])
        elif node.target == "flatten":
            self.flatten(node, self.argument(node, 1, "start_dim", 0))
        elif node.target in ("view", "reshape") and node.args[-1] == -1 and len(self.shape(node)) == 2:
            self.flatten(node, 1)
        elif node.target == "mean":
            self.mean(node)
        elif node.target not in SIZES:
            raise self.refused(node, "the operation is not supported")

    # Operations ---------------------------------------------------------------------------
    def joining(self, node: fx.Node) -> None:
        given = (*node.args[:2], node.kwargs.get("input"), node.kwargs.get("other"))
        operands = [x for x in given if isinstance(x, fx.Node)]
        maps = [x for x in operands if x not in self.parameters]
        if not maps or len({x in self.last for x in maps}) > 1:
            raise self.refused(node, "its operands have their channels in different dimensions")
        if len(maps) == 2:
            self.join(node, *(self.of(node, x, last=True) for x in maps))
        self.like(node, maps[0])
        if len(operands) > len(maps):  # a parameter is not cut, so what it is combined with isn't either
            if self.shape(node) != self.shape(maps[0]):
                raise self.refused(node, "a parameter widens a feature map")
            self.fix(node, self.labels[node])

    def like(self, node: fx.Node, source: fx.Node) -> None:
        """The node's channels are those of `source`, and lie in the same dimension."""
        self.labels[node] = self.of(node, source, last=True)
        if source in self.last:
            self.last.add(node)

    def permute(self, node: fx.Node, dims: Sequence[int]) -> None:
        source = node.args[0]
        dims = tuple(d % 4 if isinstance(d, int) else d for d in dims)
        if dims != (CHANNELS_FIRST if source in self.last else CHANNELS_LAST):
            raise self.refused(node, "only moving the channels to the last dimension and back is supported")
        self.labels[node] = self.of(node, source, last=True)
        if source not in self.last:
            self.last.add(node)

    def layer_norm(self, node: fx.Node, shape: Sequence[int]) -> None:
        """Its mean and variance are over all channels, so none of them can go."""
        source = node.args[0]
        if source not in self.last or len(shape) != 1:
            raise self.refused(node, "only layer normalization over channels in the last dimension is supported")
        self.like(node, source)
        self.fix(node, self.labels[node])

    def flatten(self, node: fx.Node, start: int) -> None:
        source = node.args[0]
        before = self.shape(source)
        if start != 1 or len(self.shape(node)) != 2:
            raise self.refused(node, "only flattening from dimension 1 is supported")
        self.labels[node] = np.repeat(self.of(node, source), prod(before[2:]))

    def mean(self, node: fx.Node) -> None:
        dims = self.argument(node, 1, "dim", None)
        dims = {d % 4 for d in ([dims] if isinstance(dims, int) else dims or ())}
        if len(self.shape(node.args[0])) != 4 or dims != {2, 3}:
            raise self.refused(node, "only the mean over height and width is supported")
        self.labels[node] = self.of(node, node.args[0])

    def pad(self, node: fx.Node) -> None:
        amounts = list(self.argument(node, 1, "pad", None)) + [0] * 8
        mode, value = self.argument(node, 2, "mode", "constant"), self.argument(node, 3, "value", None)
        front, back = amounts[4:6]
        if any(amounts[6:8]) or front < 0 or back < 0 or ((front or back) and (mode != "constant" or value)):
            raise self.refused(node, "channels can only be padded with zeros")
        inputs = self.of(node, node.args[0])
        # A zero channel lives as long as what it is later joined with.
        outputs = np.concatenate([self.new(front), inputs, self.new(back)])
        self.operations.append(Operation(node.name, None, inputs, outputs))
        self.labels[node] = outputs

    def getitem(self, node: fx.Node) -> None:
        source, index = node.args
        if source not in self.labels:
            return  # an entry of a shape
        index = index if isinstance(index, tuple) else (index,)
        whole = all(i == slice(None) for i in index[:2])
        if not whole or not all(isinstance(i, slice) for i in index):
            raise self.refused(node, "only slices of height and width are supported")
        self.labels[node] = self.of(node, source)

    # Helpers ------------------------------------------------------------------------------
    def of(self, node: fx.Node, source: Any, last: bool = False) -> Labels:
        if source not in self.labels:
            raise self.refused(node, "it uses something that is not a feature map")
        if source in self.last and not last:
            raise self.refused(node, "it is applied to feature maps with their channels in the last dimension")
        return self.labels[source]

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        meta = node.meta.get("tensor_meta")
        if not hasattr(meta, "shape"):
            raise self.refused(node, "it does not return one tensor")
        return tuple(meta.shape)

    @staticmethod
    def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
        return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)

    def refused(self, node: fx.Node, why: str) -> UserError:
        stack = node.meta.get("nn_module_stack") or {}
        owner = next(reversed(stack), "") if stack else ""
        if node.op == "call_module":
            what, owner = type(self.modules[str(node.target)]).__name__, str(node.target)
        else:
            what = getattr(node.target, "__name__", str(node.target))
        return UserError(f"operation {what} in module {owner or '(the network itself)'} can't be pruned: {why}")
