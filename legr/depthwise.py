"""Training strided depthwise convolutions on a CPU: the same gradients, without PyTorch's slow kernel."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _StridedDepthwise(torch.autograd.Function):
    """A strided depthwise convolution whose backward pass is that of stride 1, on a gradient spread by zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (down, across), channels = ctx.stride, len(weight)
        height, width = (n + 2 * p - k + 1 for n, p, k in zip(x.shape[2:], ctx.padding, weight.shape[2:], strict=True))
        # Zeros between the gradient's pixels, in memory order [N, H, W, C].
        rows = gradient.permute(0, 2, 3, 1).reshape(len(x), -1, 1, gradient.shape[3], channels)
        rows = F.pad(rows, (0, (across - 1) * channels, 0, 0, 0, down - 1))
        spread = rows.view(len(x), gradient.shape[2] * down, -1, channels)[:, :height, :width].permute(0, 3, 1, 2)
        gradients = torch.ops.aten.convolution_backward(
            spread, x, weight, None, [1, 1], list(ctx.padding), [1, 1], False, [0, 0], channels,
            [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False],
        )  # fmt: skip
        return gradients[0], gradients[1], None, None


def _strided_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.groups == module.in_channels == module.out_channels > 1
        and module.bias is None
        and max(module.stride) > 1
        and module.dilation == (1, 1)
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


@contextmanager
def fast_backward(model: nn.Module, enabled: bool = True) -> Iterator[None]:
    """While it lasts, strided depthwise convolutions of `model` on a CPU take the faster backward pass.

    PyTorch's takes up to ten times as long in bfloat16 as at stride 1, where the gradient has four times
    the size; in float32 it does not, and there is nothing to gain.
    """
    convolutions = [m for m in model.modules() if enabled and _strided_depthwise(m) and m.weight.device.type == "cpu"]

    def forward_of(conv: nn.Conv2d):
        def forward(x: Tensor) -> Tensor:
            weight = conv.weight
            if torch.is_autocast_enabled("cpu"):
                x, weight = (t.to(torch.get_autocast_dtype("cpu")) for t in (x, weight))
            return _StridedDepthwise.apply(x, weight, conv.stride, conv.padding)

        return forward

    for conv in convolutions:
        conv.forward = forward_of(conv)
    try:
        yield
    finally:
        for conv in convolutions:
            del conv.forward
