"""The networks of the paper, and loading weights into them without executing pickled code."""

import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from legr.errors import UserError


class ZeroPadShortcut(nn.Module):
    """Shortcut "option A" (He et al., CVPR 2016): subsample, then append zero channels.

    Input [N, C, H, W]; output [N, C + extra, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, extra: int, stride: int):
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.extra))


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a parameter-free shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else ZeroPadShortcut(channels - in_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


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


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet56": resnet56,
    "mobilenet_v2": mobilenet_v2,
}


SMALLEST_SIDE = {"resnet56": 4, "mobilenet_v2": 32}  # one pixel is left after all strides


def build(name: str, num_classes: int, seed: int) -> nn.Module:
    """A freshly initialized network without dropout (the paper's choice); the same `seed` gives the same weights."""
    if name not in MODELS:
        raise UserError(f"model is {name!r}; it must be one of {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](num_classes)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def imagenet_classes() -> list[str]:
    """The 1,000 WordNet ids of ILSVRC2012, in the order of a classifier's outputs."""
    return Path(__file__).with_name("imagenet_classes.txt").read_text(encoding="ascii").split()


def imagenet_rows(classes: Sequence[str]) -> list[int]:
    """Which outputs of a 1,000-class classifier are `classes`; raises UserError for what is none of the 1,000."""
    known = {wnid: i for i, wnid in enumerate(imagenet_classes())}
    if unknown := [name for name in classes if name not in known]:
        kind = "not one of ImageNet's 1,000 classes" if re.fullmatch(r"n\d{8}", unknown[0]) else "not a WordNet id"
        raise UserError(f"class folder {unknown[0]!r} is {kind}; folders must be named as in n01440764")
    return [known[name] for name in classes]


def load_weights(model: nn.Module, path: str | Path, rows: Sequence[int] | None = None) -> nn.Module:
    """Fill `model` from a safetensors file, or a state dict saved by torch.save (read without running its code).

    Args:
        rows: where the file's classifier has ImageNet's 1,000 classes, those of its rows that `model` keeps.

    Raises UserError if the file is not whole or not of this network, or if a number in it is not finite.
    """
    size, expected = _size(path), sum(t.numel() * t.element_size() for t in model.state_dict().values())
    if size > 16 * expected + 2**26:  # room for 1,000 classes in place of a few, and for double precision
        raise UserError(f"weights file {path} has {size:,} bytes; {type(model).__name__} needs about {expected:,}")
    return _fill(model, _read(path), f"weights file {path}", rows)


def load_torchvision(model: nn.Module, name: str, folder: str | Path, rows: Sequence[int] | None = None) -> nn.Module:
    """Fill `model` with torchvision's ImageNet weights for `name`, downloaded into `folder` and checked by hash.

    They are the first version (IMAGENET1K_V1; MobileNetV2: 71.9%), which the paper prunes.
    """
    import torchvision

    try:
        url = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"].url
    except (KeyError, ValueError):
        raise UserError(f"baseline.weights is 'torchvision'; torchvision has no ImageNet weights of {name}") from None
    try:
        state = torch.hub.load_state_dict_from_url(
            url, str(folder), map_location="cpu", check_hash=True, weights_only=True, progress=False
        )
    except Exception as error:
        raise UserError(
            f"torchvision's weights {url.rsplit('/', 1)[1]} could not be downloaded into {folder} ({error}); "
            f"set baseline.weights in params.yaml, or LEGR_{name.upper()}, to a weights file"
        ) from None
    return _fill(model, state, f"torchvision's {name}", rows)


def _size(path: str | Path) -> int:
    try:
        return Path(path).stat().st_size
    except OSError:
        return 0  # reading it will tell why


def _read(path: str | Path) -> dict[str, Tensor]:
    try:
        if Path(path).suffix in (".pt", ".pth"):
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist; run the stage that makes it") from None
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        kind = "state dict of tensors" if Path(path).suffix in (".pt", ".pth") else "safetensors file"
        raise UserError(f"weights file {path} is not a whole {kind} ({reason})") from None


def _fill(model: nn.Module, state: dict[str, Tensor], where: str, rows: Sequence[int] | None) -> nn.Module:
    expected = model.state_dict()
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{where} is not a state dict: a mapping from names to tensors")
    if rows is not None:
        last = [name for name in expected if name.endswith(".weight")][-1]  # the classifier's
        for name in (last, last.replace(".weight", ".bias")):
            if name in state and state[name].ndim and len(state[name]) == 1000:
                state = state | {name: state[name][list(rows)]}
    # A counter that older files lack and nothing here reads.
    counters = {n: t for n, t in expected.items() if n.endswith(".num_batches_tracked")}
    state = counters | state
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            raise UserError(
                f"{where} belongs to another network: tensor {name!r} is "
                f"{_shape(state, name)} there and must be {_shape(expected, name)}"
            )
        if not torch.isfinite(state[name]).all():
            raise UserError(f"{where} is spoilt: tensor {name!r} holds values that are not finite")
    model.load_state_dict(state)
    return model


def _shape(state: dict[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "absent"
