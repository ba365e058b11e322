"""The networks of the paper, and their weights as files: read without running pickled code."""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

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
    """A state dict for a file: weights of convolutions and linear layers as float16, all else as it is."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    return {name: tensor.half() if tensor.dim() > 1 else tensor for name, tensor in state.items()}


def save_weights(model: nn.Module, path: str | Path) -> None:
    """Write a safetensors file with weights `halved`."""
    with atomic(path) as temporary:
        save_file(halved(model.state_dict()), temporary)


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """Fill `model`, dense or pruned, from a safetensors file or a state dict saved by torch.save (.pt, .pth).

    Raises:
        UserError: the file is not whole, or of another network.
    """
    try:
        pickled = Path(path).suffix in (".pt", ".pth")
        state = torch.load(path, map_location="cpu", weights_only=True) if pickled else load_file(path)
        model.load_state_dict(state)
        if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{broken[0]} has values that are not finite")
    except FileNotFoundError:
        raise UserError(f"weights file {path} does not exist; run the stage that makes it") from None
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"weights file {path} can't be loaded into {type(model).__name__}: {reason}") from None
    return model
