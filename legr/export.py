"""A network as ONNX, for programs without PyTorch."""

import copy
import operator
from pathlib import Path

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from legr.errors import UserError
from legr.files import atomic


def to_onnx(network: nn.Module, path: str | Path, side: int) -> None:
    """Write `network`, dense or pruned, in eval mode and in float32; it is left alone.

    Input `images`, float32 [N, 3, side, side] for any N, normalized as in training; output `logits` [N, classes].
    A shortcut that subsamples and appends zero channels is written as a 1×1 convolution with weights 0 and 1:
    what slicing and padding leave behind would keep ONNX Runtime from its blocked layout in all layers after it.

    Raises:
        UserError: `side` is not positive, or a package that PyTorch's exporter needs is missing.
    """
    if side < 1:
        raise UserError(f"side is {side!r}; it must be a positive number of pixels")
    try:
        import onnxscript  # noqa: F401  torch.onnx needs it
    except ImportError:
        raise UserError("writing ONNX needs the packages onnx and onnxscript; install legr[pipeline]") from None
    network = copy.deepcopy(network).cpu().float().eval()
    example = torch.zeros(2, 3, side, side)
    with atomic(path) as temporary:
        torch.onnx.export(
            _with_convolved_shortcuts(network, example),
            (example,),
            temporary,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )


def _with_convolved_shortcuts(network: nn.Module, example: torch.Tensor) -> fx.GraphModule:
    traced = network if isinstance(network, fx.GraphModule) else fx.symbolic_trace(network)
    ShapeProp(traced).propagate(example)
    for pad in [node for node in traced.graph.nodes if node.target is F.pad]:
        given = {"mode": "constant", "value": None} | dict(
            zip(("input", "pad", "mode", "value"), pad.args, strict=False)
        )
        given |= pad.kwargs
        source, amounts, stride = given["input"], given["pad"], 1
        if given["mode"] != "constant" or given["value"] or len(amounts) != 6 or any(amounts[:4]) or min(amounts) < 0:
            continue
        if source.target is operator.getitem and _stride(source.args[1]):
            source, stride = source.args[0], _stride(source.args[1])
        shape = source.meta["tensor_meta"].shape
        if len(shape) != 4:
            continue
        channels, (front, back) = shape[1], amounts[4:]
        conv = nn.Conv2d(channels, front + channels + back, 1, stride, bias=False)
        conv.weight.data.zero_()
        conv.weight.data[front : front + channels, :, 0, 0] = torch.eye(channels)
        traced.add_submodule(f"{pad.name}_convolved", conv)
        with traced.graph.inserting_before(pad):
            pad.replace_all_uses_with(traced.graph.call_module(f"{pad.name}_convolved", (source,)))
    traced.graph.eliminate_dead_code()
    traced.recompile()
    return traced


def _stride(index: object) -> int | None:
    """s of the index [:, :, ::s, ::s], else None."""
    whole = slice(None)
    if not isinstance(index, tuple) or len(index) != 4 or index[:2] != (whole, whole) or index[2] != index[3]:
        return None
    step = index[2].step if isinstance(index[2], slice) else None
    return step if index[2] == slice(None, None, step) else None
