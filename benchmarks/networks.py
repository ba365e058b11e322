"""python -m benchmarks.networks: write the table of docs/networks.md, which networks are pruned correctly."""

import re
import signal
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import FrozenBatchNorm2d

import legr
from legr.files import write_text

PAGE = Path("docs/networks.md")
UNET = "U-Net, 4 levels"
NETWORKS = [
    "alexnet", "vgg16", "vgg16_bn", "resnet18", "resnet50", "resnext50_32x4d", "wide_resnet50_2", "densenet121",
    "googlenet", "inception_v3", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet1_0",
    "shufflenet_v2_x1_0", "squeezenet1_0", "squeezenet1_1", "efficientnet_b0", "efficientnet_v2_s",
    "regnet_x_400mf", "regnet_y_400mf", "convnext_tiny",
    "timm: resnet18", "timm: resnetv2_50", "timm: mobilenetv3_small_100", "timm: efficientnet_lite0",
    "timm: ghostnet_050", "timm: repvgg_a0", "timm: dla34", "timm: cspdarknet53", "timm: densenet121",
    "timm: convnext_atto", "timm: hardcorenas_a", "timm: rexnet_100", UNET,
    "segmentation: fcn_resnet50", "segmentation: deeplabv3_resnet50", "segmentation: lraspp_mobilenet_v3_large",
    "FPN: resnet18", "quantizable: resnet18", "normalized: resnet18",
]  # fmt: skip
FRACTION, TOLERANCE = 0.5, 1e-5  # of the dense FLOPs; of the largest output, for equality in float32


class UNet(nn.Module):
    """Down three times by pooling and up again by interpolation; a feature map of each level is concatenated."""

    def __init__(self, classes: int, widths: tuple[int, ...] = (32, 64, 128, 256)):
        super().__init__()
        self.down = nn.ModuleList(map(self.block, (3, *widths), widths))
        self.up = nn.ModuleList(self.block(here + below, here) for here, below in pairwise(widths))
        self.head = nn.Conv2d(widths[0], classes, 1)

    @staticmethod
    def block(inputs: int, outputs: int) -> nn.Module:
        convs = [nn.Conv2d(n, outputs, 3, padding=1, bias=False) for n in (inputs, outputs)]
        return nn.Sequential(*[m for conv in convs for m in (conv, nn.BatchNorm2d(outputs), nn.ReLU())])

    def forward(self, x: Tensor) -> Tensor:
        passed = [self.down[0](x)]
        for block in self.down[1:]:
            passed.append(block(F.max_pool2d(passed[-1], 2)))
        x = passed.pop()
        for block in reversed(self.up):
            x = block(torch.cat([F.interpolate(x, scale_factor=2), passed.pop()], 1))
        return self.head(x)


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network in eval mode with BatchNorm statistics that are not their defaults, and an input [2, 3, 96, 96]."""
    torch.manual_seed(0)
    if name == UNET:
        model = UNet(classes=10).eval()
    elif name.startswith("timm: "):  # imported here: it takes seconds
        import timm

        model = timm.create_model(name.removeprefix("timm: "), num_classes=10).eval()
    else:
        model = torchvisions(*name.rpartition(": ")[::2]).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d | FrozenBatchNorm2d):
            for mean, deviation in ((module.running_mean, module.running_var), (module.bias, module.weight)):
                nn.init.normal_(mean, 0, 0.1)
                nn.init.uniform_(deviation, 0.5, 2)
        elif hasattr(module, "layer_scale"):  # 1e-6 in a fresh ConvNeXt: its blocks would not count
            nn.init.uniform_(module.layer_scale, 0.5, 1)
    return model, torch.randn(2, 3, 96, 96)


def torchvisions(kind: str, name: str) -> nn.Module:
    from torchvision.models import get_model, quantization
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.transforms.v2 import Normalize

    if kind == "FPN":
        return resnet_fpn_backbone(backbone_name=name, weights=None, trainable_layers=5)
    if kind == "quantizable":
        return getattr(quantization, name)(num_classes=10)
    plain = {"weights_backbone": None} if kind == "segmentation" else {}
    plain |= {"init_weights": False, "aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    model = get_model(name, weights=None, num_classes=10, **plain)
    return nn.Sequential(Normalize([0.5] * 3, [0.2] * 3), model) if kind == "normalized" else model


def flops(model: nn.Module, x: Tensor) -> int:
    """Multiply-accumulates of a forward pass, as PyTorch counts them."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(x)
    return counter.get_total_flops() // 2


def verdict(small: nn.Module, name: str, kept: Mapping[str, Tensor]) -> str:
    """Whether `small` equals the network `name` in which other output channels than `kept`, bool by module, are 0."""
    dense, x = build(name)
    if (ratio := flops(small, x) / flops(dense, x)) >= FRACTION:
        return f"no: stays at {ratio:.0%} of the FLOPs"
    _all_outputs(small(x)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters()), "a gradient is missing"
    with torch.no_grad():
        for path, mask in kept.items():
            module = dense.get_submodule(path)
            for tensor in (module.weight, module.bias):
                if tensor is not None:
                    tensor[~mask] = 0
        expected = _all_outputs(dense(x))
        difference = ((_all_outputs(small(x)) - expected).abs().max() / expected.abs().max()).item()
    return "yes" if difference < TOLERANCE else f"no: differs from the masked dense network by {difference:.1g}"


def _all_outputs(outputs: Tensor | Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tree_leaves(outputs)])


def try_legr(name: str) -> list[str]:
    """Pruned by the norms of its filters: verdict, prunable layers, filters."""
    model, x = build(name)
    try:
        graph = legr.trace(model, x[:1])
        masks = legr.select(graph, legr.filter_norms(model, graph), FRACTION)
    except legr.UserError as error:
        return [f"no: {error}", "", ""]
    units = graph.kept_units(masks)
    kept = {o.module: torch.from_numpy(graph.kept_channels(units, o.outputs)) for o in graph.operations if o.module}
    return [verdict(legr.prune(model, graph, masks), name, kept), f"{len(graph.layers)}", f"{sum(graph.widths):,}"]


def torch_pruned(model: nn.Module, x: Tensor, fraction: float, parts: int, steps: int = 0) -> tuple[nn.Module, int]:
    """`model`, pruned in place by Torch-Pruning by the norms of its filters, and the number of steps that it took.

    Each step prunes 1 / `parts` of all filters, until the FLOPs are below `fraction`; or `steps` times.
    """
    import torch_pruning

    pruner = torch_pruning.pruner.MagnitudePruner(
        model, x, torch_pruning.importance.GroupMagnitudeImportance(p=2), global_pruning=True,
        pruning_ratio=1.0, max_pruning_ratio=0.9, iterative_steps=parts,
        ignored_layers=[m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)][-1:],  # the classifier
    )  # fmt: skip
    limit = 0 if steps else fraction * flops(model, x)
    while pruner.current_step < (steps or parts) and (steps or flops(model, x) >= limit):
        pruner.step()
    return model, pruner.current_step


def _too_long(*_: object) -> None:
    raise TimeoutError("not done in 120 s")


def try_torch_pruning(name: str) -> str:
    """The verdict. Which channels stay is read off gradients, which Torch-Pruning prunes as it does weights."""
    model, x = build(name)
    weights = {path: module.weight for path, module in model.named_modules() if hasattr(module, "weight")}
    places = {path: torch.arange(len(weight)) for path, weight in weights.items()}
    for path, weight in weights.items():
        weight.grad = places[path].view(-1, *[1] * (weight.dim() - 1)).expand(weight.shape).to(weight)
    signal.signal(signal.SIGALRM, _too_long)
    try:
        signal.alarm(120)  # seconds; it ends what takes longer
        torch_pruned(model, x[:1], FRACTION, parts=10)
        kept = {path: torch.isin(every, model.get_submodule(path).weight.grad) for path, every in places.items()}
        model.zero_grad()
        return verdict(model, name, kept)
    except Exception as error:
        return f"no: {type(error).__name__}: {(str(error).strip() or repr(error)).splitlines()[0]}"
    finally:
        signal.alarm(0)


def write_table(page: Path, rows: Iterable[Iterable[str]]) -> None:
    """Print the rows' cells and put them in place of those of the page's table; its header stays."""
    head, line, rest = re.split(r"(\n\|-[-|]*\n)", page.read_text(encoding="utf-8"))
    lines = "".join(f"| {' | '.join(cells)} |\n" for cells in rows)
    print(lines)
    write_text(page, head + line + lines + re.sub(r"\A(\|.*\n)*", "", rest))


if __name__ == "__main__":
    version("torch-pruning"), version("timm")  # raises where it is not installed
    write_table(PAGE, [[name, *try_legr(name), try_torch_pruning(name)] for name in NETWORKS])
