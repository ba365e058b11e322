"""Starting the dense network from weights trained elsewhere."""

import hashlib
import os
from pathlib import Path

from torch import nn

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
