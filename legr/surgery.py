"""Pruning: a new, smaller network out of a dense one, which is left alone."""

import copy
from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from legr.coupling import TENSORS
from legr.files import UserError
from legr.graph import ADDED, Graph, shapes_of, tensors_of


def prune(model: nn.Module, graph: Graph, kept: Sequence[Tensor]) -> nn.Module:
    """A new network without the filters that `kept` drops; parameters keep their names.

    Its outputs equal those of `model` when every layer sees zeros in place of dropped channels.

    Args:
        model: the network that `graph` was traced from (its weights may have changed since).
        kept: one bool tensor [width] per layer, as `select` gives.

    Returns:
        A torch.fx.GraphModule in the same mode and on the same device as `model`.
    """
    kept_units = graph.kept_units(kept)
    if shapes_of(model) != graph.shapes:
        raise UserError("model has other layers than the network that graph was traced from; trace it anew")
    operations = {o.node: o for o in graph.operations}
    pruned = copy.deepcopy(graph.traced)
    parts: dict[str, Any] = {}
    copies: dict[int, Any] = {}  # what modules share, they go on sharing
    for node in pruned.nodes:
        path, operation = str(node.target), operations.get(node.name)
        part = None
        if node.op in ("call_module", "get_attr"):
            part = graph.constants[path] if path in graph.constants else attrgetter(path)(model)
        stay = [graph.kept_channels(kept_units, u) for u in (operation.inputs, operation.outputs)] if operation else []
        if part is None and operation:
            _thin_pad(node, len(stay[0]), stay[1])
        elif part is not None:
            whole = operation is None or (stay[0].all() and stay[1].all())
            parts[path] = copy.deepcopy(part, copies) if whole else _thin(part, *stay)
    small = fx.GraphModule(parts, pruned, class_name=type(model).__name__)
    for path, module in small.named_modules():
        path = path.partition(ADDED)[0].rstrip(".")  # a flag goes with the module that it is in
        module.training = model.get_submodule(path).training
        if path in graph.frozen or (isinstance(module, _BatchNorm) and model.training and not module.training):
            module.train = partial(_stay_in_eval, module)
    return small


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `train`."""
    return nn.Module.train(module, False)


def _thin(module: nn.Module, into: np.ndarray, out: np.ndarray) -> nn.Module:
    """A copy of a convolution, BatchNorm or linear layer with only the channels that stay."""
    tensors = {name: t for name, t in tensors_of(module).items() if name in TENSORS and t.dim() > 0}
    thin = copy.deepcopy(module, {id(tensor): tensor for tensor in tensors.values()})  # shares what is cut below
    for name, tensor in tensors.items():
        less = cut(tensor.detach(), into, out)
        setattr(thin, name, nn.Parameter(less, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else less)
    if isinstance(module, nn.Conv2d):
        thin.out_channels = int(out.sum())
        if module.groups == module.in_channels == module.out_channels:  # depthwise
            thin.groups = thin.out_channels
        thin.in_channels = thin.groups * int(into.sum())
    elif isinstance(module, nn.Linear):
        thin.in_features, thin.out_features = int(into.sum()), int(out.sum())
    elif isinstance(module, nn.PReLU):
        thin.num_parameters = int(out.sum())
    else:
        thin.num_features = int(out.sum())
    return thin


def cut(tensor: Tensor, into: np.ndarray, out: np.ndarray) -> Tensor:
    """A weight [out, in, ...], or a vector [out], with only the channels that stay."""
    for dim, stays in enumerate((out, into)[: tensor.dim()]):
        tensor = tensor.index_select(dim, torch.from_numpy(np.flatnonzero(stays)).to(tensor.device))
    return tensor


def _thin_pad(node: fx.Node, inner: int, out: np.ndarray) -> None:
    """Append (or prepend) only those zero channels that stay; `inner` channels are between them."""
    *sides, front, _ = node.kwargs["pad"] if "pad" in node.kwargs else node.args[1]
    amounts = (*sides, int(out[:front].sum()), int(out[front + inner :].sum()))
    if "pad" in node.kwargs:
        node.update_kwarg("pad", amounts)
    else:
        node.update_arg(1, amounts)
