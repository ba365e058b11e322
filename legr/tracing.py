"""From a network to its graph: torch.fx records it, and what recording can't see is checked by numbers."""

import copy
import inspect
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from legr.files import UserError
from legr.graph import Graph, Labeller
from legr.surgery import prune

LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)
WRAPPED = {  # by type
    "DataParallel": "hand in model.module",
    "DistributedDataParallel": "hand in model.module",
    "OptimizedModule": "hand in model._orig_mod, the network before torch.compile",
}


def trace(model: nn.Module, example_input: Tensor, check: bool = True) -> Graph:
    """Find a network's prunable layers, coupled units and FLOPs. The network is left alone.

    Layers that can't be pruned stay whole, and are listed in `Graph.whole` with the reason.

    Args:
        model: a convolutional network that torch.fx can trace.
        example_input: [1, channels, height, width], for the shapes; its values do not matter.
        check: run the traced network beside the original one, in both modes, and a pruned one beside the masked one.

    Raises:
        UserError: names the module that can't be traced, or that differs when traced.
    """
    _refuse_what_is_no_network(model, example_input)
    model = copy.deepcopy(model)
    device = next((tensor.device for tensor in model.state_dict().values()), example_input.device)
    example_input = example_input.to(device)
    try:
        with torch.no_grad():
            model.eval()(example_input)
    except Exception as error:
        given = f"example_input of shape {list(example_input.shape)} and type {example_input.dtype}"
        raise UserError(f"{given} does not fit the network: {_first_line(error)}") from None
    frozen = frozenset(path for path, module in model.train().named_modules() if not module.training)
    network = _recorded(model)
    for trusted in (True, False):
        labeller = Labeller(network, trusted)
        with torch.no_grad():
            graph = labeller.found(example_input)
        graph.inputs, graph.frozen = tuple(example_input.shape[1:]), frozen
        graph.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        problem = _difference(model, graph, example_input) if check else None
        if not (problem and labeller.distrusted):
            break
    if problem:
        raise UserError(f"{problem}, so it can't be pruned")
    return graph


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _refuse_what_is_no_network(model: nn.Module, example_input: Tensor) -> None:
    name = type(model).__name__
    if name in WRAPPED:
        raise UserError(f"model is a {name}; {WRAPPED[name]}")
    if isinstance(model, torch.jit.ScriptModule):
        raise UserError("model is a ScriptModule; hand in the network that it was made from")
    if not isinstance(example_input, Tensor):
        allowed = "it must be one tensor [1, channels, height, width]"
        raise UserError(f"example_input is of type {type(example_input).__name__}; {allowed}")
    for path, module in model.named_modules():
        if isinstance(module, LAYERS) and "weight" not in module._parameters:
            remove = "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
            raise UserError(f"module {path} computes its weight from other tensors; remove that first ({remove})")


class _Tracer(fx.Tracer):
    """Does not look into layers and their subclasses, nor into `leaves`."""

    def __init__(self, leaves: set[str]):
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        whole = isinstance(m, LAYERS) or module_qualified_name in self.leaves
        return whole or super().is_leaf_module(m, module_qualified_name)


def _recorded(model: nn.Module) -> fx.GraphModule:
    """The network in eval mode. Where calls differ between modes by a flag alone, they read `training`.

    A module that does other things in training is not looked into.
    """
    leaves: set[str] = set()
    while True:
        evaluation, training = (_by_fx(copy.deepcopy(model).train(mode), leaves) for mode in (False, True))
        flag = None
        for a, b in zip_longest(evaluation.graph.nodes, training.graph.nodes):
            pairs = list(zip_longest(_call(a), _call(b)))
            if all(x == y for x, y in pairs):
                continue
            if all(x == y or (x, y) == (False, True) for x, y in pairs):
                if flag is None:
                    with evaluation.graph.inserting_before(next(iter(evaluation.graph.nodes))):
                        flag = evaluation.graph.create_node("get_attr", "training")
                values, spec = tree_flatten((a.args, a.kwargs))
                mixed = [flag if x != y else value for value, (x, y) in zip(values, pairs[2:], strict=True)]
                a.args, a.kwargs = tree_unflatten(mixed, spec)
                continue
            stacks = [n.meta["nn_module_stack"] for n in (a, b) if n is not None and n.meta.get("nn_module_stack")]
            owner = next(reversed(stacks[0])) if stacks else ""
            if owner in leaves | {""}:
                raise UserError("the network does other things in training than in evaluation, so it can't be traced")
            leaves.add(owner)
            break
        else:
            evaluation.recompile()
            return evaluation


def _call(node: fx.Node | None) -> list[Any]:
    """What a node calls, and with what: sources by their names."""
    if node is None:
        return []
    return [node.op, str(node.target), *tree_leaves(fx.node.map_arg((node.args, node.kwargs), lambda n: n.name))]


def _by_fx(model: nn.Module, leaves: set[str]) -> fx.GraphModule:
    """The network as torch.fx records it in its present mode; arguments after the first have their defaults."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    more = {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
    tracer = _Tracer(leaves)
    try:
        graph = tracer.trace(model, concrete_args=more or None)
    except Exception as error:
        where = next(reversed(tracer.module_stack), "(the network itself)")
        raise UserError(f"module {where} can't be traced by torch.fx: {_first_line(error)}") from None
    for node in reversed(graph.nodes):  # fx asserts that other arguments have their defaults
        name = getattr(node.target, "__name__", str(node.target))
        of_default = name in ("_assert", "_assert_is_none", "eq") or (node.op == "placeholder" and more)
        if of_default and not node.users and not name.startswith(parameters[0].name):
            graph.erase_node(node)
    return fx.GraphModule(model, graph)


def _difference(model: nn.Module, graph: Graph, example_input: Tensor) -> str | None:
    """What the traced network does otherwise than `model`, or a pruned one than the masked; None: nothing is seen."""
    x = torch.randn(2, *example_input.shape[1:], generator=torch.Generator().manual_seed(0)).to(example_input)
    try:
        everything = prune(model.eval(), graph, graph.masks(np.ones(graph.unit_count, bool)))
        for training in (False, True):
            try:
                expected, learns = _run(copy.deepcopy(model).train(training), x)
            except ValueError:  # BatchNorm can't be trained on one value a channel
                continue
            found, learns_traced = _run(copy.deepcopy(everything).train(training), x)
            for path, value in expected.items():
                if path in found and not _alike(value, found[path]):
                    when = "training" if training else "evaluation"
                    return f"module {path or '(the network itself)'} gives other outputs in {when} when it is traced"
            if learns != learns_traced:
                name = min(learns ^ learns_traced)
                return f"parameter {name} gets a gradient in one of the network and the traced network alone"
        units = np.random.default_rng(0).random(graph.unit_count) < 0.7
        units[[own[own >= 0][0] for own in graph.units]] = True
        small = prune(model.eval(), graph, graph.masks(units))
        if not _alike(_run(_masked(everything.eval(), graph, units), x)[0][""], _run(small, x)[0][""]):
            return "the pruned network gives other outputs than the network in which dropped channels are zero"
    except (RuntimeError, IndexError, TypeError, AttributeError) as error:
        return f"the network can't be run when it is traced and pruned: {_first_line(error)}"
    return None


def _run(network: nn.Module, x: Tensor) -> tuple[dict[str, Any], set[str]]:
    """The outputs of all modules by their paths, "" for the network's; and which parameters get a gradient."""
    outputs: dict[str, Any] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            outputs.setdefault(path, tree_map_only(Tensor, lambda t: t.detach().clone(), output))

        return hook

    for path, module in network.named_modules():
        module.register_forward_hook(note(path))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        leaves = [t for t in tree_leaves(network(x)) if isinstance(t, Tensor) and t.requires_grad]
        sum((t.float().sum() for t in leaves), torch.zeros((), requires_grad=True)).backward()
    return outputs, {name for name, p in network.named_parameters() if p.grad is not None}


def _masked(network: fx.GraphModule, graph: Graph, kept_units: np.ndarray) -> fx.GraphModule:
    """`network`, changed in place: its convolutions and linear layers read zeros in place of dropped channels."""

    def zeros(gone: Tensor) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
            x = args[0] if args else kwargs["input"]
            return (x.masked_fill(gone.to(x.device), 0),), {}

        return hook

    for operation in graph.operations:
        module = network.get_submodule(operation.module) if operation.module else None
        gone = torch.from_numpy(~graph.kept_channels(kept_units, operation.inputs))
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            module.register_forward_pre_hook(zeros(gone[:, None, None]), with_kwargs=True)
        elif isinstance(module, nn.Linear):
            module.register_forward_pre_hook(zeros(gone), with_kwargs=True)
    return network


def _alike(expected: Any, found: Any) -> bool:
    """The same tensors but for rounding."""
    pairs = list(zip_longest(tree_leaves(expected), tree_leaves(found)))
    for a, b in pairs:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b):
                return False
            continue
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64) else 5e-2
        if a.is_floating_point() and a.numel():
            largest = a.detach().abs().amax().clamp(min=1e-6)
            if not torch.allclose(a / largest, b / largest, rtol=0, atol=tolerance, equal_nan=True):
                return False
    return True
