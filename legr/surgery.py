"""Pruning: a new, smaller network out of a dense one, which is left alone."""

import copy
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from legr.files import UserError
from legr.graph import Graph, Operation


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
    modules = dict(model.named_modules())
    if missing := sorted(graph.modules - modules.keys()):
        raise UserError(f"model has no module {missing[0]}; graph was traced from another network")
    pruned = fx.Graph()
    nodes: dict[fx.Node, fx.Node] = {}
    pruned.output(pruned.graph_copy(graph.traced, nodes))
    parts: dict[str, nn.Module | nn.Parameter] = {}
    for old, new in nodes.items():
        operation = operations.get(old.name)
        if operation is None:
            if old.op == "call_module":
                parts[str(old.target)] = copy.deepcopy(modules[str(old.target)])
            elif old.op == "get_attr":
                owner, _, attribute = str(old.target).rpartition(".")
                parts[str(old.target)] = copy.deepcopy(getattr(modules[owner], attribute))
            continue
        into = graph.kept_channels(kept_units, operation.inputs)
        out = graph.kept_channels(kept_units, operation.outputs)
        if operation.module is None:
            _thin_pad(new, operation, out)
        else:
            parts[operation.module] = _thin(modules[operation.module], into, out)
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


def _thin_pad(node: fx.Node, operation: Operation, out: np.ndarray) -> None:
    """Append (or prepend) only those zero channels that stay."""
    position = 1 if len(node.args) > 1 else None
    amounts = list(node.args[1] if position else node.kwargs["pad"])
    if len(amounts) < 6:
        return  # height and width only
    front, inner = amounts[4], len(operation.inputs)
    amounts[4], amounts[5] = int(out[:front].sum()), int(out[front + inner :].sum())
    if position:
        node.args = (node.args[0], tuple(amounts), *node.args[2:])
    else:
        node.kwargs = node.kwargs | {"pad": tuple(amounts)}
    assert node.target is F.pad
