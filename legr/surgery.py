"""Pruning: a new, smaller network out of a dense one, which is left alone."""

import copy
from collections import OrderedDict
from collections.abc import Sequence
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor, fx, nn

from legr.files import UserError
from legr.graph import Graph


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
    operations = {o.node: o for o in graph.operations}
    pruned = copy.deepcopy(graph.traced)
    parts: dict[str, nn.Module | nn.Parameter] = {}
    for node in pruned.nodes:
        path, operation = str(node.target), operations.get(node.name)
        try:
            part = attrgetter(path)(model) if node.op in ("call_module", "get_attr") else None
        except AttributeError:
            raise UserError(f"model has no module {path}; graph was traced from another network") from None
        if operation is None:
            if part is not None:
                parts[path] = copy.deepcopy(part)
            continue
        into, out = (graph.kept_channels(kept_units, units) for units in (operation.inputs, operation.outputs))
        if part is None:
            _thin_pad(node, len(into), out)
        else:
            parts[path] = _thin(part, into, out)
    small = fx.GraphModule(parts, pruned, class_name=type(model).__name__)
    return small.train(model.training)


def _thin(module: nn.Module, into: np.ndarray, out: np.ndarray) -> nn.Module:
    """A copy of a convolution, BatchNorm or linear layer with only the channels that stay."""
    device = next(iter(module.state_dict().values())).device if module.state_dict() else None
    rows = torch.from_numpy(np.flatnonzero(out)).to(device)
    columns = torch.from_numpy(np.flatnonzero(into)).to(device)
    thin = copy.copy(module)  # the settings; tensors and hooks are replaced below
    thin._parameters, thin._buffers = dict(module._parameters), dict(module._buffers)
    thin._forward_hooks, thin._forward_pre_hooks = OrderedDict(), OrderedDict()
    if isinstance(module, nn.Conv2d):
        thin.out_channels = len(rows)
        if module.groups == 1:
            thin.in_channels = len(columns)
        elif module.groups == module.in_channels == module.out_channels:
            thin.in_channels = thin.groups = len(rows)
    elif isinstance(module, nn.Linear):
        thin.in_features, thin.out_features = len(columns), len(rows)
    else:
        thin.num_features = len(rows)
    matrix = isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    for name, tensor in (module._parameters | module._buffers).items():
        if tensor is None:
            continue
        value = tensor.detach()
        if value.dim() > 0:
            value = value.index_select(0, rows)
        if matrix and name == "weight":
            value = value.index_select(1, columns)
        if name in module._parameters:
            thin._parameters[name] = nn.Parameter(value.clone(), tensor.requires_grad)
        else:
            thin._buffers[name] = value.clone()
    return thin


def _thin_pad(node: fx.Node, inner: int, out: np.ndarray) -> None:
    """Append (or prepend) only those zero channels that stay; `inner` channels are between them."""
    *sides, front, _ = node.kwargs["pad"] if "pad" in node.kwargs else node.args[1]
    amounts = (*sides, int(out[:front].sum()), int(out[front + inner :].sum()))
    if "pad" in node.kwargs:
        node.update_kwarg("pad", amounts)
    else:
        node.update_arg(1, amounts)
