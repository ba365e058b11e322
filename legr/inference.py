"""Faster evaluation on a CPU: BatchNorm folded, activations and residual sums done by the convolution before them.

A pruned network is evaluated once and thrown away, so compiling it would cost more than it saves;
rewriting its graph for oneDNN's fused convolutions takes milliseconds.
"""

import copy
import operator

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse
from torch.nn import functional as F

RELU = {torch.relu, F.relu, "relu", "relu_"}
RELU6 = {F.relu6}
IN_PLACE = {operator.iadd, operator.imul}
ADD = {operator.add, operator.iadd, torch.add, "add", "add_"}


class FusedConvolution(nn.Module):
    """act(conv(x) + other): a convolution, then an optional sum, then an optional ReLU or ReLU6, in one pass.

    Input and output are channels last, [N, C, H, W], in the weight's dtype.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype):
        super().__init__()
        self.geometry = [list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups]
        self.weight = conv.weight.detach().to(dtype)
        self.ordered: dict[torch.Size, Tensor] = {}  # the weight as oneDNN wants it for inputs of a shape
        self.bias = None if conv.bias is None else conv.bias.detach().to(dtype)
        self.activation, self.limits = "none", []  # as oneDNN calls them

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        weight = self.ordered.get(x.shape)
        if weight is None:  # in an order that doesn't fit the shape, it would be put in order again by every call
            weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *self.geometry, list(x.shape))
            self.ordered[x.shape] = weight
        if other is None:
            after = (self.activation, self.limits, "")
            return torch.ops.mkldnn._convolution_pointwise(x, weight, self.bias, *self.geometry, *after)
        unary = (None if self.activation == "none" else self.activation, self.limits, None)
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, other, weight, self.bias, *self.geometry, "add", 1.0, *unary
        )


class _Inference(nn.Module):
    def __init__(self, network: fx.GraphModule, dtype: torch.dtype):
        super().__init__()
        self.network, self.dtype = network, dtype

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x.to(self.dtype)).float()


def can_be_fast(device: str, dtype: torch.dtype) -> bool:
    """Whether `fast_inference` works on this machine: on a CPU, where oneDNN computes in `dtype`."""
    if not device.startswith("cpu") or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fast_inference(model: nn.Module, dtype: torch.dtype, in_place: bool = False) -> nn.Module:
    """A network for evaluation alone that gives the outputs of `model` in eval mode, within rounding, sooner.

    Args:
        model: a network that torch.fx traces, on the CPU.
        dtype: what it computes in, bfloat16 or float32; outputs are float32.
        in_place: whether `model` may be taken apart for it, because nothing else needs it; else it is left alone.
    """
    traced = model if isinstance(model, fx.GraphModule) else fx.symbolic_trace(model)
    traced = (traced if in_place else copy.deepcopy(traced)).eval()
    network = fuse(traced, inplace=True, no_trace=True).to(dtype)  # folds BatchNorm
    modules = dict(network.named_modules())
    for node in list(network.graph.nodes):
        conv = modules.get(str(node.target)) if node.op == "call_module" else None
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            continue
        fused = FusedConvolution(conv, dtype)
        network.set_submodule(str(node.target), fused)
        last, after, added = node, _only_user(node), None
        if after is not None and after.target in ADD and not after.kwargs and len(after.args) == 2:
            other = after.args[after.args[0] is node]
            safe = not any(_changes(user, node.args[0], modules) for user in node.args[0].users)
            if safe and isinstance(other, fx.Node) and _shape(other) == _shape(node) is not None:
                last = added = after
                after = _only_user(added)
                added.prepend(node)  # where the other summand is known
                node.args = (*node.args, other)
        kind = modules.get(str(after.target)) if after is not None and after.op == "call_module" else None
        if after is not None and (isinstance(kind, nn.ReLU) or after.target in RELU):
            last, fused.activation = after, "relu"
        elif after is not None and (isinstance(kind, nn.ReLU6) or after.target in RELU6):
            last, fused.activation, fused.limits = after, "hardtanh", [0.0, 6.0]
        if last is not node:
            last.replace_all_uses_with(node)
            for done in dict.fromkeys((last, added)):
                if done is not None:
                    network.graph.erase_node(done)
    network.recompile()
    return _Inference(network, dtype).eval()


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _changes(node: fx.Node, value: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether `node` changes `value` in place."""
    module = modules.get(str(node.target)) if node.op == "call_module" else None
    in_place = getattr(module, "inplace", False) or node.kwargs.get("inplace", False)
    in_place |= node.target in IN_PLACE or (node.op == "call_method" and str(node.target).endswith("_"))
    return bool(in_place) and node.args[0] is value


def _shape(node: fx.Node) -> torch.Size | None:
    """As `legr.trace` found it in the dense network; channels that are added are cut together."""
    known = node.meta.get("tensor_meta")
    return getattr(known, "shape", None)
