"""From a network to its graph: torch.fx records it, and what recording can't see is checked by numbers."""

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from operator import attrgetter
from textwrap import shorten
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from legr.coupling import Labeller
from legr.files import UserError
from legr.graph import ADDED, Flag, Function, Graph, shapes_of, tensors_of
from legr.surgery import cut, prune

CALL = nn.Module.__call__  # torch.fx puts its own in this place while it records
LAYERS = (nn.modules.conv._ConvNd, nn.modules.batchnorm._BatchNorm, nn.Linear)
WRAPPED = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}  # by type


@torch.no_grad()
@torch.random.fork_rng()
def trace(model: nn.Module, example_input: Tensor, check: bool = True) -> Graph:
    """Find a network's prunable layers, coupled units and FLOPs. The network is left alone.

    Layers that can't be pruned stay whole, and are listed in `Graph.whole` with the reason.

    Args:
        model: a convolutional network that torch.fx can trace.
        example_input: [1, channels, height, width], for its shape and type; its values do not matter.
        check: run the traced network beside the original one, in both modes, and a pruned one beside the masked one.

    Raises:
        UserError: names the module that can't be traced, or that differs when traced.
    """
    _refuse_what_is_no_network(model, example_input)
    model, x = _copied(model, example_input)
    frozen = frozenset(path for path, module in model.train().named_modules() if not module.training)
    leaves: dict[str, str] = {}  # modules that are not looked into, and why
    distrusted: set[str] = set()  # steps that compute otherwise than their rules say
    while True:
        network, constants = _recorded_alike(model, leaves, x)
        labeller = Labeller(network, leaves, distrusted)
        graph = labeller.found(x)
        graph.inputs, graph.frozen = tuple(example_input.shape[1:]), frozen
        graph.shapes, graph.constants = shapes_of(model), constants
        wrong = _wrong_steps(model, graph, labeller, x, distrusted) if check else set()
        if not wrong:
            return graph
        distrusted |= wrong


def _copied(model: nn.Module, example_input: Tensor) -> tuple[nn.Module, Tensor]:
    """A copy of the network without weights that are all zero, which would hide what is wrong, and images for it."""
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise UserError(f"the network can't be copied: {_first_line(error)}") from None
    device = next((tensor.device for tensor in tensors_of(model).values()), example_input.device)
    x = torch.randn(2, *example_input.shape[1:], generator=torch.Generator().manual_seed(0))
    x = x.to(device, example_input.dtype)
    try:
        model.eval()(x)
    except Exception as error:
        example = f"example_input of shape {list(example_input.shape)} and type {example_input.dtype}"
        raise UserError(f"{example} does not fit the network: {_first_line(error)}") from None
    for p in model.parameters():
        if p.is_floating_point() and not p.any():
            p.normal_(0, 0.1)
    return model, x


def _recorded_alike(model: nn.Module, leaves: dict[str, str], x: Tensor) -> tuple[fx.GraphModule, dict[str, Any]]:
    """The network as recorded in evaluation and in training alike, and its constants.

    Modules that must not be looked into for that are added to `leaves`.
    """
    while True:
        known = len(leaves)
        network, constants, some = _recorded(model.eval(), leaves, x, False)
        trained, _, more = _recorded(model.eval(), leaves, x, True)
        if len(leaves) == known and str(network.graph) == str(trained.graph):
            return network, constants
        if len(leaves) == known:
            leaves |= dict.fromkeys((some | more) - {""}, "it does other things in training")
        if len(leaves) == known:
            raise UserError("the network does other things in training than in evaluation, so it can't be traced")


def _wrong_steps(model: nn.Module, graph: Graph, labeller: Labeller, x: Tensor, distrusted: set[str]) -> set[str]:
    """Names of steps that compute otherwise when channels are missing.

    Raises:
        UserError: the traced network differs from the original, or a step stays wrong that is distrusted already.
    """
    units = np.random.default_rng(0).random(graph.unit_count) < 0.7
    for which, stays in ((-1, False), (0, True)):  # each layer has filters of both kinds
        units[[of_layer[of_layer >= 0][which] for of_layer in graph.units]] = stays
    dense, small = (prune(model, graph, graph.masks(u)) for u in (units | True, units))
    if problem := _difference(model, dense, x):
        raise UserError(f"{problem}, so it can't be pruned")
    wrong = _wrong_when_pruned((dense, small), graph, units, labeller, x)
    if wrong and wrong <= distrusted:
        raise UserError(
            f"{min(wrong)} gives other values or gradients in the pruned network than where dropped channels are zero, "
            "so it can't be pruned"
        )
    return wrong


def _first_line(error: Exception) -> str:
    return shorten((str(error).strip() or type(error).__name__).splitlines()[0], 200, placeholder=" …")


def _refuse_what_is_no_network(model: nn.Module, example_input: Tensor) -> None:
    if not isinstance(model, nn.Module):
        raise UserError(f"model is of type {type(model).__name__}; it must be a torch.nn.Module")
    for path, module in model.named_modules():
        name, kind = f"model.{path}".rstrip("."), type(module).__name__
        if kind in WRAPPED or isinstance(module, torch.jit.ScriptModule):
            within = f"{name}.{WRAPPED[kind]}" if kind in WRAPPED else "the network that it was made from"
            raise UserError(f"{name} is a {kind}; hand in {within} in its place")
        computed = {"weight", "bias"} - module._parameters.keys()
        if computed and isinstance(module, LAYERS):
            remove = "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove"
            raise UserError(
                f"module {path} computes its {max(computed)} from other tensors; remove that first ({remove})"
            )
    for name, tensor in tensors_of(model).items():
        if is_lazy(tensor) or tensor.is_meta or tensor.is_complex():
            raise UserError(
                f"{name} is lazy, complex or on the meta device; the network's tensors must have real values"
            )
    if not isinstance(example_input, Tensor) or example_input.dim() != 4:
        shape = f" and shape {list(example_input.shape)}" if isinstance(example_input, Tensor) else ""
        problem = f"example_input is of type {type(example_input).__name__}{shape}"
        raise UserError(f"{problem}; it must be one tensor [1, channels, height, width]")


def _recorded(model: nn.Module, leaves: dict[str, str], x: Tensor, training: bool) -> tuple[fx.GraphModule, dict, set]:
    """What torch.fx records, what of it is not in `model`, by its path, and modules that branch on their mode.

    Arguments after the first have their defaults. Modules that can't be recorded are added to `leaves`.
    """
    root, tracer = _with_mode_as_buffer(model), _tracer(model, leaves, x, training)
    try:
        graph = tracer.trace(root)
        next(iter(graph.nodes)).target = next(iter(inspect.signature(model.forward).parameters))
        parts, constants = {}, {}
        for n in [n for n in graph.nodes if n.op in ("call_module", "get_attr")]:
            owner, _, name = n.target.rpartition(".")
            if name == "training":
                n.op, n.target = "call_module", f"{owner}.{ADDED}".lstrip(".")
                constants[n.target] = Flag()
            try:
                parts[n.target] = attrgetter(n.target)(model)
            except AttributeError:
                added = tracer.functions.get(n.target, getattr(root, n.target, None))
                parts[n.target] = constants.setdefault(n.target, added)
        return fx.GraphModule(parts, graph), constants, tracer.branching
    except Exception as error:
        where = next((path for path, _ in reversed(tracer.module_stack.values())), "")
        if where in {"", *leaves}:
            name = where or "(the network itself)"
            raise UserError(f"module {name} can't be traced by torch.fx: {_first_line(error)}") from None
        leaves[where] = f"it can't be traced by torch.fx: {_first_line(error)}"
    return _recorded(model, leaves, x, training)


def _tracer(model: nn.Module, leaves: dict[str, str], x: Tensor, training: bool) -> fx.Tracer:
    """Calls that take self.training read a `Flag`. Where a forward pass branches on it, it is taken for `training`.

    Lists of chunks or sizes are as long as for the images `x`. A torch.autograd.Function is a step of its own.
    """
    plain = inspect.getattr_static(torch.autograd.Function, "apply")

    class Tracer(fx.Tracer):  # local, so that torch.fx does not pickle it with the network
        proxy_buffer_attributes = True
        branching: ClassVar[set[str]] = set()
        functions: ClassVar[dict[str, Function]] = {}  # by their path in the traced network

        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            whole = isinstance(m, (*LAYERS, Function)) or module_qualified_name in leaves
            # torchvision's transforms do nothing to what is no image, such as what torch.fx records with.
            whole = whole or m.__module__.startswith("torchvision.transforms")
            return whole or super().is_leaf_module(m, module_qualified_name)

        def to_bool(self, obj: fx.Proxy) -> bool:
            owner, _, name = str(obj.node.target).rpartition(".")
            if obj.node.op != "get_attr" or name != "training":
                return super().to_bool(obj)
            self.branching.add(owner)
            return training

        def length(self, obj: fx.Proxy) -> int:
            node, so_far = obj.node, fx.Interpreter(model, False, self.graph)  # `node` is made when it is asked for
            with suppress(Exception), patch.object(nn.Module, "__call__", CALL):
                so_far.run(x.clone())
            if not isinstance(value := so_far.env.get(node), tuple | list):
                raise fx.proxy.TraceError(f"the length of {node.name} is read")
            return len(value)

        def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
            return iter([obj[i] for i in range(self.length(obj))])

        def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
            def apply(function: type, *args: Any, **kwargs: Any) -> Any:
                if not any(isinstance(value, fx.Proxy) for value in args):
                    return plain.__get__(None, function)(*args, **kwargs)
                path = f"{ADDED}_{len(root._modules) + len(self.functions)}"
                self.functions[path] = Function(function)
                return self.create_proxy("call_module", path, args, kwargs)

            function = patch.object(torch.autograd.Function, "apply", classmethod(apply))
            with function, patch.object(fx.Proxy, "__len__", lambda obj: self.length(obj)):
                return super().trace(root, concrete_args)

    return Tracer()


def _with_mode_as_buffer(model: nn.Module) -> nn.Module:
    """A copy for torch.fx, which records what is read of tensors and takes an attribute such as `training` as it is.

    `training` of every module is a buffer, and the forward pass has one argument: the others have their defaults.
    """
    model = copy.deepcopy(model)
    forward = model.forward
    model.__class__ = type(type(model).__name__, (type(model),), {"forward": lambda self, x: forward(x)})
    for module in model.modules():
        del module.training
        module._buffers["training"] = torch.zeros(())
    return model


def _difference(model: nn.Module, dense: fx.GraphModule, x: Tensor) -> str | None:
    """What the traced network does otherwise than `model`; None: nothing is seen."""
    unseen = "something in its forward pass that torch.fx does not record, such as torch.no_grad, autocast or a hook"
    for training, images in ((False, x), (True, x), (False, torch.cat([x, x[:1]]))):  # other numbers of images, too
        try:
            expected, traced = (_run(copy.deepcopy(network).train(training), images) for network in (model, dense))
        except ValueError:  # BatchNorm can't be trained on one value a channel
            continue
        except Exception as error:
            return f"the network can't be run when it is traced: {_first_line(error)}"
        for name, value in expected.items():
            if name in traced and not _alike(value, traced[name]):
                return f"{name} differs in {'training' if training else 'evaluation'} when it is traced, by {unseen}"
    return None


@torch.enable_grad()
def _run(network: nn.Module, x: Tensor) -> dict[str, Any]:
    """The outputs of all modules, the buffers afterwards, and the parameters' gradients, by their names."""
    values: dict[str, Any] = {}
    for path, module in network.named_modules():
        name = f"the output of {f'module {path}' if path else 'the network'}"
        module.register_forward_hook(
            lambda _, __, output, name=name: values.update({name: tree_map_only(Tensor, Tensor.clone, output)})
        )
    torch.manual_seed(0)
    gradients = _gradients(network(x), dict(network.named_parameters()))
    values |= {f"buffer {name}": buffer for name, buffer in network.named_buffers()}
    # A gradient that is zero but for rounding, as of a bias before BatchNorm, is judged beside the largest of all.
    largest = max((g.abs().max().item() for g in gradients.values() if g is not None), default=0.0)
    beside = {"pad": (0, 1), "value": largest if network.training else largest / 1000}
    for name, gradient in reversed(gradients.items()):  # the last one is nearest to what differs
        values[f"the gradient of {name}"] = None if gradient is None else F.pad(gradient.flatten(), **beside)
    return values


def _gradients(outputs: Any, read: Any) -> Any:
    """In place of each tensor of `read` its gradient, or None, of a sum of all outputs with different weights."""
    outputs = [t.flatten() for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]
    values, spec = tree_flatten(read)
    trained = [t for t in values if isinstance(t, Tensor) and t.requires_grad]
    weights = [torch.arange(len(t), device=t.device).cos().to(t.dtype) for t in outputs]
    found = torch.autograd.grad(outputs, trained, weights, allow_unused=True) if outputs and trained else ()
    by_id = dict(zip(map(id, trained), found, strict=False))
    return tree_unflatten([by_id.get(id(t)) for t in values], spec)


@torch.enable_grad()
def _wrong_when_pruned(
    networks: Sequence[fx.GraphModule], graph: Graph, units: np.ndarray, labeller: Labeller, x: Tensor
) -> set[str]:
    """The steps that in a pruned network compute otherwise than in the dense one with zeros for dropped channels.

    They give other values, or in evaluation other gradients of what they read and of their module's parameters.
    """
    wrong: set[str] = set()
    operations = {o.node: o for o in graph.operations}
    stays = torch.from_numpy(graph.kept_channels(units, labeller.unit))

    def less(gradients: tuple[list[Any], dict[str, Tensor]], n: fx.Node) -> tuple[list[Any], dict[str, Tensor]]:
        read, weights = gradients
        if operation := operations.get(n.name):
            sides = [graph.kept_channels(units, side) for side in (operation.inputs, operation.outputs)]
            weights = {name: cut(weight, *sides) for name, weight in weights.items()}
        return _masked(read, [labeller.labels[source] for source in n.all_input_nodes], stays)[1], weights

    for training in (False, True):  # in training without dropout, which draws other numbers for fewer channels
        dense, small = (_started(network, labeller, x, training) for network in networks)
        for (n, labels), twin in zip(labeller.labels.items(), small.graph.nodes, strict=True):
            try:
                value, read = _step(dense, n)
            except ValueError:  # BatchNorm can't be trained on one value a channel
                break
            dense.env[n], expected = _masked(value, labels, stays)
            try:
                found, read_there = _step(small, twin)
                right = _alike(expected, found)
                if right and not training:
                    right = _alike(less(_gradients(expected, read), n), _gradients(found, read_there), least=1)
            except Exception:
                right = False
            wrong |= set() if right else {n.name}
            if not right or any(isinstance(value, Tensor) for value in tree_leaves(expected)):
                found = expected  # so that the next steps are judged by themselves
            small.env[twin] = found
    return wrong


def _started(network: fx.GraphModule, labeller: Labeller, x: Tensor, training: bool) -> fx.Interpreter:
    run = fx.Interpreter(network, False)
    run.args_iter = iter([x])
    for path in {o.module for o in labeller.operations if o.module}:
        run.module.get_submodule(path).train(training)
    return run


def _step(run: fx.Interpreter, n: fx.Node) -> tuple[Any, tuple[list[Any], dict[str, Tensor]]]:
    """What a step gives; what it reads, and its module's parameters."""
    weights = dict(run.module.get_submodule(n.target).named_parameters()) if n.op == "call_module" else {}
    read = [
        tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.is_floating_point()), run.env[source])
        for source in n.all_input_nodes
    ]
    for source, value in zip(n.all_input_nodes, read, strict=True):
        run.env[source] = tree_map_only(Tensor, Tensor.clone, value)  # a step may change it in place
    torch.manual_seed(0)
    return run.run_node(n), (read, weights)


def _masked(value: Any, labels: Any, stays: Tensor) -> tuple[Any, Any]:
    """A step's value with zeros in place of dropped channels, and without them; `stays` is a bool for each label."""
    values, spec = tree_flatten(tree_map_only(Tensor, Tensor.clone, value))
    kept = [t.clone() if isinstance(t, Tensor) else t for t in values]
    for i, label in enumerate(tree_leaves(labels)):
        if isinstance(label, Tensor) and isinstance(values[i], Tensor) and not (mask := stays[label]).all():
            mask = mask.to(values[i].device)
            values[i] = values[i].masked_fill(~mask, 0)
            for dim, size in enumerate(mask.shape):
                stay = mask.movedim(dim, 0).reshape(size, -1).any(1)
                kept[i] = kept[i].index_select(dim, stay.nonzero().flatten())
    return tree_unflatten(values, spec), tree_unflatten(kept, spec)


def _alike(expected: Any, found: Any, least: float = 1e-6) -> bool:
    """The same tensors but for rounding, which is judged beside their largest value, or beside `least`."""
    for a, b in zip_longest(tree_leaves(expected), tree_leaves(found)):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if type(a) is not type(b):
                return False
        elif a.shape != b.shape or a.dtype != b.dtype:
            return False
        elif (a.is_floating_point() or a.is_complex()) and a.numel():
            largest = a.detach().abs().amax().clamp(min=least)
            tolerance = 1e-4 if a.device.type == "cpu" else 1e-3  # GPUs may multiply in TF32
            tolerance = 5e-2 if a.dtype in (torch.float16, torch.bfloat16) else tolerance
            if not torch.allclose(a / largest, b / largest, rtol=0, atol=tolerance, equal_nan=True):
                return False
    return True
