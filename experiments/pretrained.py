"""Starting the dense network from weights trained elsewhere."""

import hashlib
import os
from pathlib import Path

import torch
from torch import fx, nn

from legr import models


def start(model: nn.Module, name: str, weights: str, classes: list[str], downloads: Path) -> dict[str, str]:
    """Fill `model` from `weights`: "torchvision", or a file, relative to the project or absolute.

    The environment variable LEGR_<MODEL> (LEGR_MOBILENET_V2) names a file that replaces torchvision's
    download. Where the classes are WordNet ids, a 1,000-class classifier keeps just their rows.

    Returns:
        What was loaded, for the results: its name, and a file's SHA-256.
    """
    known = set(models.imagenet_classes())
    rows = models.imagenet_rows(classes) if any(c in known for c in classes) else None
    file = os.environ.get(f"LEGR_{name.upper()}") if weights == "torchvision" else weights
    if not file:
        models.load_torchvision(model, name, downloads, rows)
        return {"weights": "torchvision IMAGENET1K_V1"}
    path = Path(file).expanduser()
    path = path if path.is_absolute() else downloads.parent.parent / path
    models.load_weights(model, path, rows)
    return {"weights": path.name, "weights_sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@torch.no_grad()
def rescale(model: nn.Module) -> None:
    """Scale each convolution that BatchNorm follows so that its filters' median L2 norm is 1.

    The network computes what it did: BatchNorm's statistics are scaled alike. But a layer whose filters
    have norm n learns 1/n² as fast (van Laarhoven, arXiv:1706.05350), and norms rank filters. Weights
    that were folded for deployment, and then unfolded, come with layers 100 times apart.
    """
    modules = dict(model.named_modules())
    for node in fx.symbolic_trace(model).graph.nodes:
        norm = modules.get(str(node.target)) if node.op == "call_module" else None
        source = node.args[0] if isinstance(norm, nn.BatchNorm2d) else None
        conv = modules.get(str(source.target)) if source is not None and source.op == "call_module" else None
        if not isinstance(conv, nn.Conv2d) or conv.bias is not None or len(source.users) > 1:
            continue
        factor = 1 / conv.weight.flatten(1).norm(dim=1).median().clamp(min=1e-6)
        conv.weight *= factor
        norm.running_mean *= factor
        norm.running_var.copy_(((norm.running_var + norm.eps) * factor**2 - norm.eps).clamp(min=0))
