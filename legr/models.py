"""The networks of the paper, and loading weights into them without executing pickled code."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
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
    return torchvision.models.mobilenet_v2(weights=None, num_classes=num_classes)


MODELS: dict[str, Callable[[int], nn.Module]] = {
    "resnet56": resnet56,
    "mobilenet_v2": mobilenet_v2,
}


def build(name: str, num_classes: int, seed: int) -> nn.Module:
    """A freshly initialized network; the same `seed` gives the same weights."""
    if name not in MODELS:
        raise UserError(f"model is {name!r}; it must be one of {', '.join(MODELS)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[name](num_classes)


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill `model` from a safetensors file; raises UserError if the file is not its weights."""
    try:
        state = load_file(path)
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist; run the stage that makes it") from None
    except Exception as error:
        raise UserError(f"weights file {path} is not a whole safetensors file ({error})") from None
    expected = model.state_dict()
    for name in sorted(expected.keys() | state.keys()):
        if name not in state or name not in expected or state[name].shape != expected[name].shape:
            raise UserError(
                f"weights file {path} belongs to another network: tensor {name!r} is "
                f"{_shape(state, name)} there and must be {_shape(expected, name)}"
            )
    model.load_state_dict(state)
    return model


def _shape(state: dict[str, Tensor], name: str) -> str:
    return str(list(state[name].shape)) if name in state else "absent"
