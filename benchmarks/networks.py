"""python -m benchmarks.networks: which networks of torchvision can be pruned, here and by Torch-Pruning.

Every network, with random weights, is cut to half of its FLOPs by the norms of its filters; the pruned one must
compute what the dense one does with the dropped filters silenced, and pass a gradient to every parameter.
Writes docs/networks.md.
"""

import importlib.metadata
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import legr
from legr.files import write_text

PAGE = Path("docs/networks.md")
NETWORKS = (
    "alexnet", "vgg16", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121",
    "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0",
    "shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
)  # fmt: skip
FRACTION = 0.5


@dataclass(frozen=True)
class Outcome:
    """`refusal` is the sentence that says why not; empty where it worked."""

    refusal: str = ""
    layers: int = 0
    filters: int = 0
    flops_ratio: float = math.nan
    difference: float = math.nan  # from the silenced dense network, relative to its largest output


def build(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The network in eval mode with BatchNorm statistics that are not their defaults, and an input for it."""
    torch.manual_seed(0)
    plain = {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torchvision.models.get_model(name, weights=None, num_classes=10, **plain).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, 0, 0.1)
    for name, parameter in model.named_parameters():
        if name.endswith("layer_scale"):  # 1e-6 in a fresh ConvNeXt: its blocks would not count
            nn.init.uniform_(parameter, 0.5, 1)
    return model, torch.randn(2, 3, 96, 96)


def try_legr(name: str) -> Outcome:
    model, x = build(name)
    try:
        graph = legr.trace(model, x[:1])
        kept = legr.select(graph, legr.filter_norms(model, graph), FRACTION)
    except legr.UserError as error:
        return Outcome(str(error))
    small = legr.prune(model, graph, kept)
    small(x).sum().backward()
    without = [n for n, p in small.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without, f"{name}: no gradient for {without[0]}"
    with torch.inference_mode():
        difference = (small(x) - silenced(model, graph, kept)(x)).abs().max() / small(x).abs().max()
    ratio = multiply_accumulates(small, x) / multiply_accumulates(model, x)
    return Outcome("", len(graph.layers), sum(graph.widths), ratio, difference.item())


def silenced(model: nn.Module, graph: legr.Graph, kept: list[torch.Tensor]) -> nn.Module:
    """`model`, changed in place: of dropped filters there is no output, nor anything left after BatchNorm."""
    units = graph.kept_units(kept)
    with torch.no_grad():
        for operation in graph.operations:
            if operation.module is not None:
                module = model.get_submodule(operation.module)
                gone = torch.from_numpy(~graph.kept_channels(units, operation.outputs))
                module.weight[gone] = 0
                if module.bias is not None:
                    module.bias[gone] = 0
    return model


def multiply_accumulates(model: nn.Module, x: torch.Tensor) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(x)
    return counter.get_total_flops() // 2


def try_torch_pruning(name: str) -> Outcome:
    """By norm over all layers, a hundredth of the filters at a time, until half of the FLOPs are gone."""
    import torch_pruning

    model, x = build(name)
    dense = multiply_accumulates(model, x)
    last = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 10]
    try:
        pruner = torch_pruning.pruner.MagnitudePruner(
            model,
            x[:1],
            torch_pruning.importance.GroupMagnitudeImportance(p=2),
            global_pruning=True,
            pruning_ratio=1.0,
            max_pruning_ratio=0.9,
            iterative_steps=100,
            ignored_layers=last,
        )
        while multiply_accumulates(model, x) >= FRACTION * dense and pruner.current_step < 100:
            pruner.step()
        model(x).sum().backward()
    except Exception as error:
        return Outcome(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error) else repr(error))
    ratio = multiply_accumulates(model, x) / dense
    return Outcome("" if ratio < FRACTION else f"stays at {ratio:.0%} of the FLOPs", flops_ratio=ratio)


def cells(outcome: Outcome) -> list[str]:
    """Of the table, what LeGR's outcome fills."""
    if outcome.refusal:
        return [f"no: {outcome.refusal}", "", ""]
    return ["yes", str(outcome.layers), f"{outcome.filters:,}"]


def main() -> None:
    version = importlib.metadata.version("torch-pruning")
    lines = []
    for name in NETWORKS:
        ours, theirs = try_legr(name), try_torch_pruning(name)
        row = [name, *cells(ours), f"no: {theirs.refusal}" if theirs.refusal else "yes"]
        lines.append(f"| {' | '.join(row)} |")
        print(lines[-1], f"{ours.flops_ratio:.4f} {ours.difference:.1e} {theirs.flops_ratio:.4f}", flush=True)
    write_text(
        PAGE,
        f"""# Which networks can be pruned

Any that torch.fx can trace and that is made of supported operations; what is not supported is refused by name. Below,
one or two of each family of torchvision's convolutional classifiers
(torchvision {torchvision.__version__.split("+")[0]}, random weights, 10 classes, 96×96 pixels),
cut to {FRACTION:.0%} of the FLOPs by the norms of the filters. "Yes" means that the pruned network computes what the
dense one does with the dropped filters silenced, that its FLOPs as PyTorch counts them are below the target, and that
every parameter gets a gradient. Torch-Pruning {version} beside it, in the same run: "yes" means that it came below
the target, and that forward and backward passes run.

| network | LeGR | prunable layers | filters | Torch-Pruning |
|---|---|---|---|---|
{chr(10).join(lines)}

Made by `python -m benchmarks.networks` (needs `pip install torch-pruning=={version}`); a test marked slow checks the
columns of LeGR. Grouped convolutions that are not depthwise (ResNeXt, RegNet) stay whole, as do channels under layer
normalization (ConvNeXt); what surrounds them is pruned.
""",
    )


if __name__ == "__main__":
    main()
