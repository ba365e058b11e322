"""Starting the dense network from weights trained elsewhere."""

import contextlib
import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from experiments.settings import Settings
from legr import models
from legr.files import UserError

# Outputs of an ImageNet classifier (1,000 classes, sorted by WordNet id) that are the classes of Imagenette.
IMAGENETTE = {
    "n01440764": 0, "n02102040": 217, "n02979186": 482, "n03000684": 491, "n03028079": 497,
    "n03394916": 566, "n03417042": 569, "n03425413": 571, "n03445777": 574, "n03888257": 701,
}  # fmt: skip


def read(settings: Settings, classes: Sequence[str], root: Path) -> dict[str, Tensor]:
    """The state dict of `dense.weights`: "torchvision", or a file, relative to the project's `root` or absolute.

    The environment variable LEGR_<MODEL> (LEGR_MOBILENET_V2) names a file that replaces torchvision's download.
    Where the images are Imagenette's, an ImageNet classifier keeps just their outputs.

    Raises:
        UserError: the weights can't be had.
    """
    path = _file(settings)
    try:
        if path:
            state = models.read_weights(root / Path(path).expanduser())
        else:
            from torchvision.models import get_model_weights

            options = {"model_dir": str(root / "data/downloads"), "check_hash": True, "weights_only": True}
            with contextlib.redirect_stdout(sys.stderr):  # torch.hub names a path, which is not for notebooks
                state = get_model_weights(settings.model)["IMAGENET1K_V1"].get_state_dict(**options)
    except Exception as error:
        raise _refused(settings, error) from None
    if set(classes) <= IMAGENETTE.keys():
        rows = [IMAGENETTE[wordnet_id] for wordnet_id in classes]
        state |= {key: value[rows] for key, value in state.items() if value.shape[:1] == (1000,)}
    return state


def start(model: nn.Module, settings: Settings, classes: Sequence[str], root: Path) -> dict[str, str]:
    """Fill `model` with what `read` gives, brought to one scale where the settings say so; its name, for the record."""
    path, state = _file(settings), read(settings, classes, root)
    try:
        models.fill(model, state, path or "of torchvision")
    except UserError as error:
        raise _refused(settings, error) from None
    if settings.dense.rescale:
        rescale(model)
    return {"weights": Path(path).name if path else "torchvision IMAGENET1K_V1"}


def _file(settings: Settings) -> str | None:
    weights = settings.dense.weights
    return os.environ.get(_variable(settings)) if weights == "torchvision" else weights


def _variable(settings: Settings) -> str:
    return f"LEGR_{settings.model.upper()}"


def _refused(settings: Settings, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    problem = f"dense.weights is {settings.dense.weights!r} and can't be used ({reason})"
    return UserError(f"{problem}; set it, or {_variable(settings)}, to a weights file")


@torch.no_grad()
def rescale(model: nn.Module) -> None:
    """Scale each convolution that BatchNorm follows so that its filters' median L2 norm is 1; outputs stay.

    A layer whose filters have norm n learns 1/n² as fast (van Laarhoven, arXiv:1706.05350), and norms rank filters.
    Weights that were folded for deployment, and then unfolded, come with layers 100 times apart. The model registers
    each BatchNorm right after its convolution, as all of `legr.models` do.
    """
    for conv, norm in itertools.pairwise(model.modules()):
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            factor = 1 / conv.weight.flatten(1).norm(dim=1).median().clamp(min=1e-6)
            conv.weight *= factor
            norm.running_mean *= factor
            norm.running_var.copy_(((norm.running_var + norm.eps) * factor**2 - norm.eps).clamp(min=0))
