"""The networks of the paper, and their weights as files: read without running pickled code."""

import itertools
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.serialization import safe_globals

from legr.files import UserError, atomic


class BasicBlock(nn.Module):
    """Two 3×3 convolutions, and a shortcut without parameters: "option A" (He et al., CVPR 2016).

    Input [N, C, H, W]; output [N, channels, ceil(H / stride), ceil(W / stride)]. Where that is another shape, the
    shortcut is subsampled, and zero channels are appended.
    """

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.extra = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.stride > 1 or self.extra > 0:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """ResNet for 32×32 images (He et al., section 4.2): 6n + 2 layers in three stages."""

    def __init__(self, blocks: int, num_classes: int = 10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        channels = [16] + [16] * blocks + [32] * blocks + [64] * blocks
        self.blocks = nn.Sequential(
            *(BasicBlock(before, after, 1 if before == after else 2) for before, after in itertools.pairwise(channels))
        )
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.adaptive_avg_pool2d(self.blocks(x), 1).flatten(1)
        return self.linear(x)


def resnet56(num_classes: int = 10) -> nn.Module:
    """ResNet-56 with option-A shortcuts: 125,485,696 multiply-accumulates at 32×32."""
    return CifarResNet(9, num_classes)


def mobilenet_v2(num_classes: int = 1000) -> nn.Module:
    """torchvision's MobileNetV2: 300,774,272 multiply-accumulates at 224×224, 1,000 classes."""
    import torchvision  # here, because it takes seconds that only this network needs

    return torchvision.models.mobilenet_v2(weights=None, num_classes=num_classes)


MODELS: dict[str, Callable[[int], nn.Module]] = {"resnet56": resnet56, "mobilenet_v2": mobilenet_v2}


def build(name: str, num_classes: int, seed: int) -> nn.Module:
    """A freshly initialized network; the same `seed` gives the same weights."""
    if name not in MODELS:
        raise UserError(f"model is {name!r}; it must be one of {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](num_classes)


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy for a file: weights of layers (real, two dimensions or more, and in reach) as float16, all else as is."""
    state = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
    halves = {name: tensor.half() for name, tensor in state.items() if tensor.dim() > 1 and tensor.is_floating_point()}
    return state | {name: half for name, half in halves.items() if half.isfinite().all()}


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a safetensors file with weights `halved`."""
    with atomic(path) as temporary:
        save_file(halved(model.state_dict()), temporary)


class _Skipped:
    def __init__(self, *_: Any):
        """Takes the place of what a checkpoint holds beside tensors: none of that is imported or run."""

    __setstate__ = __init__


_ARRAYS = [f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")]
_SKIPPED = [(_Skipped, name) for name in ("argparse.Namespace", "numpy.dtype", "numpy.ndarray", *_ARRAYS)]
_NAMES = "((ema|state|dict|model|net|network|module|params|weights)_?)+"  # of a state dict in a checkpoint


def _state_dict(value: Any) -> dict[str, Tensor] | None:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return None
    inner = [value[key] for key in sorted(value, key=lambda key: "ema" not in key) if re.fullmatch(_NAMES, key)]
    plain = all(isinstance(tensor, Tensor) for tensor in value.values())
    return next(filter(None, map(_state_dict, inner)), value if plain else None)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file of safetensors or torch.save, told apart by content; pickled code never runs.

    It may lie in `state_dict`, `model`, `net`, `ema` and the like (`model_state_dict`, `state_dict_ema`), nested too.
    Of several, a moving average (`ema`) wins, then the first in the file. UserError says why there is none.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(24)
    except OSError as error:
        remedy = "correct the path or run the stage that makes it"
        raise UserError(f"weights file {path} can't be read: {error.strerror}; {remedy}") from None
    try:
        with open(path, "rb") as file, safe_globals(_SKIPPED), warnings.catch_warnings(action="ignore"):
            loaded = load_file(path) if start[8:9] == b"{" else torch.load(file, map_location="cpu", weights_only=True)
        state = _state_dict(loaded) or {}
        bad = [name for name, tensor in state.items() if not tensor.isfinite().all()]
        if state and not bad:
            return state
        cause = f"{bad[0]!r} has values that are not finite" if bad else "it has no state dict; save model.state_dict()"
    except Exception as error:
        cause = "it is empty, cut off or of another format than safetensors and torch.save; copy or save it again"
        if start[:2] in (b"PK", b"\x80\x02") and re.search("GLOBAL|TorchScript", str(error)):
            cause = "it holds more than tensors; save model.state_dict()"
        elif start.startswith(b"version https://git-lfs"):
            cause = "it is a pointer of git-lfs; run git lfs pull"
    raise UserError(f"weights file {path} can't be read: {cause}")


def fill(model: nn.Module, state: dict[str, Tensor], path: str | Path) -> nn.Module:
    """Fill `model`, dense or pruned, with the tensors of `path`; where they are refused (UserError), it stays as it is.

    Prefixes of wrappers (`module.`, `_orig_mod.`, `model.`) are taken off. Extra tensors of one element, such as a
    profiler's `total_ops`, are ignored with a warning. Old files may lack `num_batches_tracked`.
    """
    expected = model.state_dict()
    large = [name for name, tensor in state.items() if tensor.numel() > 1]
    prefixes = itertools.accumulate((f"{part}." for part in min(large, default="").split(".")), initial="")
    shared = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in large)]
    prefix = max(shared, key=lambda prefix: sum(name.removeprefix(prefix) in expected for name in state))
    state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    extra = [repr(name) for name in state if name not in expected]
    pairs = [(name, state[name], to) for name, to in expected.items() if name in state]
    faults = {
        "missing": [name for name in expected if name not in state and not name.endswith("num_batches_tracked")],
        "unknown": [repr(name) for name, tensor in state.items() if name not in expected and tensor.numel() != 1],
        "of another shape": [f"{n} {list(t.shape)}, not {list(to.shape)}" for n, t, to in pairs if t.shape != to.shape],
        "of another type": [f"{n} {t.dtype}" for n, t, to in pairs if t.is_floating_point() < to.is_floating_point()],
    }
    if cause := ", ".join(f"{len(names)} {what} ({', '.join(names[:3])})" for what, names in faults.items() if names):
        raise UserError(f"weights file {path} can't be loaded into {type(model).__name__}: {cause}")
    if extra:
        warnings.warn(f"weights file {path}: counters ignored ({len(extra)}): {', '.join(extra[:3])}", stacklevel=3)
    model.load_state_dict(state, strict=False)
    return model


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """`fill` a model from a file: see `read_weights`."""
    return fill(model, read_weights(path), path)
