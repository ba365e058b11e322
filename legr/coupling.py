"""What operations do to channels: a traced network is run, and beside each value its channels' labels.

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
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from legr.files import UserError
from legr.graph import Graph, Layer, Operation, because, reads, tensors_of

FIXED = 0  # the label of channels that must stay
TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}  # of layers that are cut
Labels = Tensor  # int64 [channels]


class _Whole(Exception):
    """Nothing that an operation reads or gives can be dropped; says why."""


class Labeller(fx.Interpreter):
    """Runs the traced network, and beside each value its labels: int64 tensors of the same shape.

    `RULES` says what an operation does to them. An operation without a rule is left whole: it gets and gives what it
    does in the dense network. Feature maps have equal labels over height and width, kept as expanded tensors
    [N, C, 1, 1], so that they take no memory.

    Args:
        leaves: modules that are not looked into, by their paths, and why.
        distrusted: names of steps that are left whole, since they compute otherwise than their rules say.
    """

    def __init__(self, network: fx.GraphModule, leaves: dict[str, str], distrusted: set[str]):
        super().__init__(network, garbage_collect_values=False)
        self.extra_traceback = False  # a refusal is one sentence
        self.leaves, self.distrusted = leaves, distrusted
        self.labels: dict[fx.Node, Any] = {}
        self.count = FIXED + 1  # of labels
        self.joined: list[Tensor] = []  # int64 [2, pairs] each: labels that are dropped together or not at all
        self.operations: list[Operation] = []
        self.prunable: list[Operation] = []
        self.whole: dict[str, str] = {}
        self.kinds: dict[fx.Node, type | str] = {}  # of operations with a rule: its name in `RULES`
        self.uses = reads(network)
        self.constant: set[fx.Node] = set()  # made of parameters and buffers alone
        self.other_work = False  # whether an operation without a rule may cost FLOPs

    def found(self, x: Tensor) -> Graph:
        """The graph, by a forward pass of images [N, C, H, W]."""
        self.run(x)
        pairs = torch.cat([torch.empty(2, 0, dtype=torch.int64), *self.joined], 1).numpy()
        links = coo_array((np.ones(pairs.shape[1]), pairs), shape=(self.count, self.count))
        group = connected_components(links, directed=False)[1]  # of each label; labels of a group are joined
        layers = [o for o in self.prunable if (group[o.outputs] != group[FIXED]).any()]
        if not layers:
            raise UserError(f"this network has no layers that can be pruned{because(self.whole)}")
        # Units are numbered by their first filter, which settles equal scores.
        free = dict.fromkeys(g for o in layers for g in group[o.outputs].tolist() if g != group[FIXED])
        unit_of_group = np.full(len(group), -1)
        unit_of_group[list(free)] = np.arange(len(free))
        self.unit = unit_of_group[group]  # of each label, -1 if it must stay
        graph = Graph(
            layers=[Layer(o.module, len(o.outputs)) for o in layers],
            operations=[replace(o, inputs=self.unit[o.inputs], outputs=self.unit[o.outputs]) for o in self.operations],
            traced=self.module.graph,
            units=[self.unit[o.outputs] for o in layers],
            other_params=0,
            other_flops=0,
            whole=self.whole,
            unactivated=self.unactivated([layer.module for layer in layers]),
        )
        # torch.fx drops parameters that are not used.
        graph.other_params = sum(p.numel() for p in self.module.parameters()) - graph.params()
        if self.other_work:  # the counter takes seconds to import; its FLOPs are two a multiply-accumulate
            with FlopCounterMode(display=False) as counter:
                self.module(x)
            graph.other_flops = counter.get_total_flops() // (2 * len(x)) - graph.flops()
        return graph

    def run_node(self, n: fx.Node) -> Any:
        self.node = n
        self.value = super().run_node(n)
        self.labels[n] = self.labelled()
        return self.value

    def labelled(self) -> Any:
        """The labels of the current node's value; what is no tensor is its own label."""
        n, fixed = self.node, tree_map_only(Tensor, _fixed, self.value)
        sources = tree_leaves([self.labels[source] for source in n.all_input_nodes])
        mapped = [x for x in sources if isinstance(x, Tensor)]
        if n.op == "get_attr" or (n.all_input_nodes and self.constant.issuperset(n.all_input_nodes)):
            self.constant.add(n)
        if n.op in ("placeholder", "get_attr") or not any(isinstance(x, Tensor) for x in tree_leaves(self.value)):
            return fixed  # a parameter is not cut: what it is combined with isn't either
        if n.op != "output":
            args = fx.node.map_arg(n.args, self.labels.__getitem__)
            kwargs = dict(fx.node.map_arg(n.kwargs, self.labels.__getitem__))
            if "input" in kwargs:
                args = (kwargs.pop("input"), *args)
            try:
                labels = self.rule()(self, *args, **kwargs)
                if [*map(np.shape, tree_leaves(labels))] == [*map(np.shape, tree_leaves(fixed))]:
                    return labels
                why = "it gives another shape than usual"
            except Exception as error:  # of any kind: a call that the rule does not know
                why = str(error) if isinstance(error, _Whole) else "it mixes channels, or is called in an unusual way"
            if n.op == "call_module" or any(x.any() for x in mapped):
                self.stays_whole(why)
            self.other_work = True
        for x in mapped:
            self.join(x, _fixed(x))
        return fixed

    def stays_whole(self, why: str) -> None:
        """Note why what the current node reads and gives can't be pruned."""
        n = self.node
        owner = next(reversed(n.meta.get("nn_module_stack") or {}), "(the network itself)")
        what = type(self.layer).__name__ if n.op == "call_module" else getattr(n.target, "__name__", n.target)
        self.whole.setdefault(owner.partition("@")[0], f"{what}: {why}")

    def rule(self) -> "Rule":
        """Modules are known by their type, functions and methods by their name."""
        if self.node.name in self.distrusted:
            raise _Whole("it computes otherwise when channels are missing")
        name, home = self.node.target, "torch"
        if self.node.op == "call_module":
            name = next((base for base in type(self.layer).__mro__ if base in RULES), None)
            if not name and not tensors_of(self.layer) and self.only_passes_on():
                return _pointwise
        elif self.node.op == "call_function":
            name, home = name.__name__, str(name.__module__).partition(".")[0]
        if name not in RULES or home not in ("torch", "torchvision", "_operator", "builtins"):
            raise _Whole(self.leaves.get(self.node.target, "no rule says what it does to channels"))
        self.kinds[self.node] = name
        return RULES[name]

    def unactivated(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Those of `layers` whose output is added to something or convolved before anything activates it.

        BatchNorm, pooling, a product with weights of channels, and a depthwise convolution activate nothing. A product
        of two maps does, as in x · sigmoid(x).
        """
        reaching: dict[fx.Node, set[str]] = {}  # layers whose output, not activated, a node's value is made of
        unactivated: set[str] = set()
        for node in self.module.graph.nodes:
            kind = self.kinds.get(node)
            sources = [reaching[source] for source in node.all_input_nodes if source in reaching]
            layers_before = set().union(*sources)
            convolves = kind in (nn.Conv2d, nn.Linear)
            if kind is nn.Conv2d:
                conv = self.module.get_submodule(str(node.target))
                convolves = not conv.groups == conv.in_channels == conv.out_channels > 1
            shapes = [np.shape(self.env[source]) for source in node.args if isinstance(source, fx.Node)]
            multiplies = kind in MULTIPLYING and len(shapes) == 2 and shapes[0] == shapes[1]
            adds = kind in ADDING and len(node.all_input_nodes) > 1
            if convolves or adds:
                unactivated |= layers_before
            if convolves:
                reaching[node] = {str(node.target)}
            elif kind is not None and kind not in ACTIVATIONS and not multiplies:
                reaching[node] = layers_before
        return tuple(layer for layer in layers if layer in unactivated)

    def only_passes_on(self) -> bool:
        """Whether the current module gives what it gets in eval mode, as dropout, and mixes nothing in training."""
        inputs, output = [self.env[source] for source in self.node.all_input_nodes], self.value
        if len(inputs) != 1 or not isinstance(output, Tensor) or not torch.equal(inputs[0], output):
            return False

        def trained(x: Tensor) -> Tensor:
            torch.manual_seed(0)
            return copy.deepcopy(self.layer).train()(*fx.node.map_arg(self.node.args, lambda _: x.clone()))

        half, fewer = torch.rand(output.shape, device=output.device) < 0.5, output[:, 1:]
        mixes = not torch.equal(trained(output)[half], trained(torch.where(half, output, 0))[half])
        return not mixes and trained(fewer).shape == fewer.shape

    # What rules ask about and do ----------------------------------------------------------
    @property
    def layer(self) -> nn.Module:
        """The module that the current node calls."""
        return self.module.get_submodule(str(self.node.target))

    def channels(self, x: Tensor, axis: int = 1) -> Labels:
        """The labels along dimension `axis`, which must not change along the others."""
        x = x.movedim(axis, -1)
        rows = x[tuple(slice(0, None if stride else 1) for stride in x.stride()[:-1])].reshape(-1, x.shape[-1])
        if x.dim() < 2 or (rows != rows[0]).any():
            raise _Whole("its channels are in another dimension")
        return rows[0]

    def map_of(self, labels: Labels) -> Tensor:
        """A feature map [N, C, …] of the current value's shape with these channels."""
        shape = self.value.shape
        return labels.view(1, -1, *[1] * (len(shape) - 2)).expand(shape)

    def new(self, count: int) -> Labels:
        self.count += count
        return torch.arange(self.count - count, self.count)

    def join(self, left: Tensor, right: Tensor) -> None:
        """Channels at the same place are dropped together or not at all."""
        left, right = _without_repetition(left, right)
        self.joined.append(torch.stack([left.flatten(), right.flatten()]))

    def operation(self, inputs: Labels, outputs: Labels, prunable: bool = False) -> None:
        """Note what surgery must know of the current node. Multiply-accumulates follow from the weights' shape."""
        module = str(self.node.target) if self.node.op == "call_module" else None
        tensors = tensors_of(self.layer) if module else {}
        if any(self.uses[id(t)] > 1 for t in tensors.values()):
            raise _Whole("its weights are used twice")
        # What PyTorch's own forward pass does not read may be there, such as a profiler's counters.
        if set(tensors) - TENSORS and not type(self.layer).forward.__module__.startswith("torch.nn"):
            raise _Whole("it has tensors of its own")
        tensors = {name: t for name, t in tensors.items() if name in TENSORS}
        kernel = sum(t[0, 0].numel() for t in tensors.values() if t.dim() > 1)
        positions = prod(self.value.shape[1:]) // len(outputs)
        vectors = sum(isinstance(t, nn.Parameter) for t in tensors.values() if t.dim() == 1)
        counts = (kernel * positions, kernel, vectors)
        self.operations.append(Operation(self.node.name, module, inputs.numpy(), outputs.numpy(), *counts))
        self.prunable += self.operations[-1:] if prunable else []


def _without_repetition(*tensors: Tensor) -> list[Tensor]:
    """The same without the dimensions along which all of them are expanded (equal shapes)."""
    for dim in range(tensors[0].dim()):
        if all(x.stride(dim) == 0 for x in tensors):
            tensors = tuple(x.narrow(dim, 0, 1) for x in tensors)
    return list(tensors)


def _varying(labels: Tensor) -> list[int]:
    """The dimensions along which labels may vary."""
    return [dim for dim in range(labels.dim()) if labels.shape[dim] > 1 and labels.stride(dim)]


def _fixed(value: Tensor) -> Any:
    return torch.tensor(FIXED).expand(value.shape) if value.dim() else FIXED


# Rules: what an operation does to the labels of its inputs, given the operation's own arguments.
Rule = Callable[..., Any]


def _convolution(net: Labeller, x: Tensor) -> Tensor:
    conv, inputs, outputs = net.layer, net.channels(x), net.new(net.layer.out_channels)
    if conv.groups == 1:
        read = inputs
    elif conv.groups == conv.in_channels == conv.out_channels:  # depthwise: input and output channel are one unit
        net.join(inputs, outputs)
        read = torch.tensor([FIXED])  # each filter reads one channel, whatever is kept
    else:
        raise _Whole("its filters come in groups")
    labels = net.map_of(outputs)
    net.operation(read, outputs, prunable=True)
    return labels


def _linear(net: Labeller, x: Tensor) -> Tensor:
    """On [N, H, W, C] a 1×1 convolution, prunable; else its outputs go only with filters that they meet."""
    inputs, outputs = net.channels(x, axis=-1), net.new(net.layer.out_features)
    labels = outputs.expand(net.value.shape)
    net.operation(inputs, outputs, prunable=x.dim() == 4)
    return labels


def _by_channel(net: Labeller, x: Tensor) -> Tensor:
    """Parameters and buffers [C]: BatchNorm, PReLU."""
    labels = net.channels(x)
    if any(t.dim() == 1 and len(t) > 1 for name, t in tensors_of(net.layer).items() if name in TENSORS):
        net.operation(labels, labels)
    return x


def _pointwise(net: Labeller, x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x


def _by_map(net: Labeller, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """Works on each channel's map by itself: pooling, means, resizing, spatial padding."""
    return net.map_of(net.channels(x))


def _joining(net: Labeller, x: Any, other: Any, **_: Any) -> Tensor:
    """An elementwise operation on two tensors, or on one and a number."""
    if not isinstance(x, Tensor) or not isinstance(other, Tensor):
        return x if isinstance(x, Tensor) else other
    dims, shape = net.value.dim(), net.value.shape
    x, other = (labels[(None,) * (dims - labels.dim())] for labels in (x, other))
    for wide, narrow in ((x, other), (other, x)):
        if not _varying(narrow) and all(narrow.shape[dim] == 1 for dim in _varying(wide)):
            net.join(narrow, _fixed(narrow))  # the same for all channels of the other: it stays, and couples nothing
            return wide.expand(shape)
    if net.constant.intersection(net.node.all_input_nodes):
        net.stays_whole("a parameter or buffer is not cut, and so not what it is combined with")
    net.join(x.expand(shape), other.expand(shape))
    return x.expand(shape)


def _pad(net: Labeller, x: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Tensor:
    front, back, *more = [*pad[4:], 0, 0]
    amounts = net.node.kwargs["pad"] if "pad" in net.node.kwargs else net.node.args[1]
    if any(isinstance(amount, fx.Node) for amount in amounts[4:5]):
        raise _Whole("its padding in front is computed")
    if any(more) or front < 0 or back < 0 or ((front or back) and (mode != "constant" or value)):
        raise _Whole("channels can only be padded with zeros")
    inputs = net.channels(x)
    if front or back:
        # A zero channel lives as long as what it is later joined with.
        inputs = torch.cat([net.new(front), inputs, net.new(back)])
        net.operation(inputs[front : len(inputs) - back], inputs)
    return net.map_of(inputs)


def _moving(net: Labeller, *args: Any, **kwargs: Any) -> Any:
    """What only moves channels, whatever their number, moves the labels."""
    n = net.node
    if n.op == "call_module":
        return net.layer(*args, **kwargs)
    return n.target(*args, **kwargs) if n.op == "call_function" else getattr(args[0], n.target)(*args[1:], **kwargs)


def _reshape(net: Labeller, x: Tensor, *sizes: Any) -> Tensor:
    """To vectors and back; the number of channels must not stand there as a number."""
    wanted = net.node.args[1:] if len(sizes) > 1 else net.node.args[1]
    shape, old = net.value.shape, x.shape
    follows = isinstance(wanted, Sequence) and len(wanted) > 1 and (wanted[1] == -1 or isinstance(wanted[1], fx.Node))
    if not follows or shape[0] != old[0] or not (len(shape) == 2 or shape[1] == old[1]):
        raise _Whole("it gives a fixed number of channels, or mixes them; flatten(1) or view(N, -1) do not")
    return x.reshape(shape)


def _getitem(net: Labeller, x: Any, index: Any) -> Any:
    """An element of a tuple; or a part of each channel's map."""
    if isinstance(x, Tensor):
        simple = all(i is None or i is Ellipsis or isinstance(i, int | slice) for i in tree_leaves(index))
        if not simple or len(_without_repetition(x[index])[0].unique()) < len(_without_repetition(x)[0].unique()):
            raise _Whole("it picks channels")
    return x[index]


ACTIVATIONS = [
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.GELU, nn.SiLU, nn.Mish, nn.ELU, nn.CELU, nn.SELU, nn.Softplus, nn.Sigmoid,
    nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.PReLU,
    "relu", "relu_", "relu6", "leaky_relu", "gelu", "silu", "mish", "elu", "sigmoid", "sigmoid_", "tanh", "hardswish",
    "hardsigmoid", "hardtanh", "softplus", "clamp", "clamp_", "abs", "sqrt", "exp",
]  # fmt: skip
POINTWISE = [
    *ACTIVATIONS, nn.Dropout, nn.Dropout2d, nn.Identity, "neg", "dropout", "dropout2d", "stochastic_depth",
    "contiguous", "float", "clone", "detach", "to", "type_as",
]  # fmt: skip
BY_MAP = [
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.UpsamplingBilinear2d,
    nn.ZeroPad2d, nn.ReflectionPad2d, nn.ReplicationPad2d, nn.ConstantPad2d,
    "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate",
    "mean", "sum", "amax", "amin", "std", "var", "logsumexp",
]  # fmt: skip
ADDING = ["add", "add_", "iadd", "sub", "sub_", "isub"]
MULTIPLYING = ["mul", "mul_", "imul"]
JOINING = [*ADDING, *MULTIPLYING, "div", "div_", "truediv", "itruediv"]
MOVING = [nn.Flatten, "flatten", "permute", "squeeze", "unsqueeze", "expand_as", "cat", "concat"]
RULES: dict[type | str, Rule] = {
    **dict.fromkeys(POINTWISE, _pointwise), **dict.fromkeys(BY_MAP, _by_map), **dict.fromkeys(JOINING, _joining),
    **dict.fromkeys(MOVING, _moving), "view": _reshape, "reshape": _reshape,
    "getitem": _getitem, nn.Conv2d: _convolution, nn.Linear: _linear, "pad": _pad,
    **dict.fromkeys([nn.modules.batchnorm._BatchNorm, nn.PReLU], _by_channel),
}  # fmt: skip
