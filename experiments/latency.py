"""Where the time of a forward pass goes, layer by layer."""

import copy
import time
from collections.abc import Mapping

import pandas as pd
import torch
from torch import nn

from legr.training import Compute

KINDS = ("1×1 convolution", "depthwise convolution", "other convolution", "BatchNorm", "activation", "rest")


def _kind(module: nn.Module) -> str | None:
    if isinstance(module, nn.Conv2d):
        if module.groups > 1:
            return "depthwise convolution"
        return "1×1 convolution" if module.kernel_size == (1, 1) else "other convolution"
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return "BatchNorm"
    return "activation" if isinstance(module, nn.ReLU | nn.ReLU6 | nn.Hardtanh) else None


def by_layer(
    networks: Mapping[str, nn.Module], side: int, batch: int, compute: Compute, repetitions: int, warmup: int
) -> pd.DataFrame:
    """Where the time of a forward pass goes: the median time of every layer, as PyTorch runs it (nothing folded).

    Networks take turns, as in `measure`. What is no layer of its own (additions, pooling, functional
    activations, the linear layer) is one row, "rest".

    Returns:
        Columns network, module, kind (one of KINDS), widths ("in → out"), flops (multiply-accumulates
        per image), macs_per_byte (per byte of feature maps and weights that the layer reads and writes), ms.
    """
    inputs = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    inputs = inputs.to(compute.device, memory_format=torch.channels_last)
    times: dict[tuple[str, str], list[float]] = {}
    facts: dict[tuple[str, str], dict[str, object]] = {}
    now = {"network": "", "start": 0.0, "inside": 0.0}

    def clock() -> float:
        if compute.device.startswith("cuda"):
            torch.cuda.synchronize()
        return 1000 * time.perf_counter()

    def before(_module: nn.Module, _inputs: tuple) -> None:
        now["start"] = clock()

    def after(name: str, kind: str, module: nn.Module, given: tuple, output: torch.Tensor) -> None:
        spent = clock() - now["start"]
        now["inside"] += spent
        key = (now["network"], name)
        times.setdefault(key, []).append(spent)
        if key not in facts:
            weights = module.weight.numel() if isinstance(module, nn.Conv2d) else 0
            flops = weights * output[0, 0].numel()
            moved = output.element_size() * (given[0].numel() + output.numel() + weights)
            widths = f"{given[0].shape[1]} → {output.shape[1]}"
            facts[key] = {"kind": kind, "widths": widths, "flops": flops, "macs_per_byte": flops * batch / moved}

    hooks = []
    for network in networks.values():
        network.eval()
        for name, module in network.named_modules():
            if kind := _kind(module):
                hooks.append(module.register_forward_pre_hook(before))
                hooks.append(module.register_forward_hook(lambda m, i, o, n=name, k=kind: after(n, k, m, i, o)))
    try:
        with torch.inference_mode(), compute.autocast():
            for repetition in range(warmup + repetitions):
                if repetition == warmup:
                    times.clear()
                for label, network in networks.items():
                    now |= {"network": label, "inside": 0.0}
                    start = clock()
                    network(inputs)
                    times.setdefault((label, "rest"), []).append(clock() - start - now["inside"])
    finally:
        for hook in hooks:
            hook.remove()
    nothing = {"kind": "rest", "widths": "", "flops": 0, "macs_per_byte": 0.0}
    rows = [
        {"network": label, "module": name, **facts.get((label, name), nothing), "ms": pd.Series(spent).median()}
        for (label, name), spent in times.items()
    ]
    return pd.DataFrame(rows)


def shortfall(layers: pd.DataFrame, network: str, dense: str = "dense") -> pd.DataFrame:
    """What each layer of `network` takes beyond its share of FLOPs: ms − ms(dense) · flops / flops(dense).

    For layers without multiply-accumulates, and "rest", beyond the whole network's share.

    Args:
        layers: as `by_layer` returns.

    Returns:
        Columns module, kind, widths, flops_ratio, time_ratio, macs_per_byte, excess_ms; largest excess first.
    """
    own, full = (layers[layers.network == n].set_index("module") for n in (network, dense))
    share = own.flops.sum() / full.flops.sum()
    ratio = (own.flops / full.flops).fillna(share)
    table = pd.DataFrame(
        {
            "kind": own.kind,
            "widths": full.widths.reindex(own.index) + "  ⇒  " + own.widths,
            "flops_ratio": ratio,
            "time_ratio": own.ms / full.ms,
            "macs_per_byte": own.macs_per_byte,
            "excess_ms": own.ms - full.ms * ratio,
        }
    )
    return table.sort_values("excess_ms", ascending=False).reset_index()


def alignment(
    network: nn.Module, names: list[str], side: int, batch: int, compute: Compute, multiple: int, repetitions: int
) -> pd.DataFrame:
    """What uneven widths cost: each named convolution beside one whose widths are rounded up to `multiple`.

    Returns:
        Columns module, widths, ms, rounded, rounded_ms, arithmetic (of the rounded layer over its own).
    """
    shapes: dict[str, torch.Size] = {}
    modules = dict(network.named_modules())
    hooks = [
        modules[name].register_forward_pre_hook(lambda _m, given, n=name: shapes.update({n: given[0].shape}))
        for name in names
    ]
    with torch.inference_mode():
        network.eval()(torch.zeros(batch, 3, side, side, device=compute.device))
    for hook in hooks:
        hook.remove()
    rows = []
    for name in names:
        conv, shape = modules[name], shapes[name]
        widths = [-(-width // multiple) * multiple for width in (conv.in_channels, conv.out_channels)]
        groups = widths[0] if conv.groups > 1 else 1
        rounded = nn.Conv2d(*widths, conv.kernel_size, conv.stride, conv.padding, groups=groups, bias=False)
        rounded.to(compute.device, memory_format=torch.channels_last)
        spent = {}
        for label, layer, width in (("ms", conv, shape[1]), ("rounded_ms", rounded, widths[0])):
            inputs = torch.randn(batch, width, *shape[2:], device=compute.device, dtype=torch.float32)
            inputs = inputs.to(memory_format=torch.channels_last)
            if compute.precision == "bfloat16":
                inputs, layer = inputs.bfloat16(), copy.deepcopy(layer).bfloat16()
            samples = []
            with torch.inference_mode():
                for _ in range(3 + repetitions):
                    start = time.perf_counter()
                    layer(inputs)
                    if compute.device.startswith("cuda"):
                        torch.cuda.synchronize()
                    samples.append(1000 * (time.perf_counter() - start))
            spent[label] = pd.Series(samples[3:]).median()
        row = {"module": name, "widths": f"{conv.in_channels} → {conv.out_channels}", "ms": spent["ms"]}
        more = rounded.weight.numel() / conv.weight.numel()
        row |= {"rounded": f"{widths[0]} → {widths[1]}", "rounded_ms": spent["rounded_ms"], "arithmetic": more}
        rows.append(row)
    return pd.DataFrame(rows)
