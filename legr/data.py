"""Images as tensors: the held-out split, batches, and augmentation on the device."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from legr.errors import UserError
from legr.files import atomic, tensors_digest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Images:
    """A labelled set in memory: `pixels` uint8 [N, 3, H, W], `labels` int64 [N]."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return Images(self.pixels[index], self.labels[index])

    def to(self, device: str | torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))

    def first(self, count: int) -> "Images":
        """The first `count` images (all of them when there are fewer)."""
        return self[:count]


@dataclass(frozen=True)
class Dataset:
    """A data set in memory: `fit` + `holdout` are the training set, disjoint."""

    name: str
    classes: list[str]
    fit: Images  # the baseline trains on these
    holdout: Images  # the search judges candidates on these
    test: Images  # accuracy is reported on these
    fingerprint: str  # SHA-256 of everything above

    @property
    def train(self) -> Images:
        """All training images, as fine-tuning uses them."""
        return Images(
            torch.cat([self.fit.pixels, self.holdout.pixels]),
            torch.cat([self.fit.labels, self.holdout.labels]),
        )

    def to(self, device: str | torch.device) -> "Dataset":
        parts = {k: getattr(self, k).to(device) for k in ("fit", "holdout", "test")}
        return replace(self, **parts)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to float32 with ImageNet's mean and standard deviation, channels last."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(1, 3, 1, 1) * 255
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def batches(images: Images, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized batches in order, without augmentation."""
    for start in range(0, len(images), size):
        part = images[slice(start, start + size)]
        yield normalize(part.pixels), part.labels


def augmented_batches(
    images: Images,
    size: int,
    generator: torch.Generator,
    resolution: int | None = None,
    flip: bool = True,
    pad: int = 4,
) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled epoch of random crops (zero padding of `pad`) and horizontal flips.

    Args:
        images: the training images, on the device where they are used.
        size: batch size; an incomplete last batch is dropped, unless it is the only one.
        generator: on the CPU; decides order, crops and flips, so that every device agrees.
        resolution: side to which crops are shrunk before normalization; None leaves them.
        flip: False for images that mean something else mirrored.
    """
    device, n, side = images.pixels.device, len(images), images.pixels.shape[-1]
    padded = F.pad(images.pixels, (pad,) * 4)
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    flips = torch.rand(n, generator=generator) < (0.5 if flip else 0)
    along = torch.arange(side)
    for start in range(0, max(n - size, 0) + 1, size):
        index = order[start : start + size]
        rows = offsets[0, index, None] + along
        columns = offsets[1, index, None] + torch.where(flips[index, None], side - 1 - along, along)
        picks = (index[:, None, None], rows[:, :, None], columns[:, None, :])
        here = [p.to(device) for p in picks]
        # Indices around a slice put the channels last: [B, H, W, 3].
        crops = padded[here[0], :, here[1], here[2]].permute(0, 3, 1, 2)
        if resolution is not None and resolution != side:
            crops = F.interpolate(crops.float(), size=(resolution,) * 2, mode="bilinear", antialias=True)
        yield normalize(crops), images.labels[here[0][:, 0, 0]]


def split_holdout(labels: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices (fit, holdout), drawn class by class so that both have the classes' shares."""
    n = len(labels)
    if not 0 < count < n:
        raise UserError(f"holdout is {count}; it must be between 1 and {n - 1}, the training images less one")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(n, generator=generator)
    # Rank of each image within its class, as a fraction: the smallest `count` are held out.
    within = torch.zeros(n, dtype=torch.float64)
    for label in labels.unique():
        mine = order[labels[order] == label]
        within[mine] = (torch.arange(len(mine)) + 0.5).double() / len(mine)
    ranked = torch.argsort(within, stable=True)
    return ranked[count:].sort().values, ranked[:count].sort().values


def save(path: Path, name: str, classes: list[str], train: Images, test: Images, holdout: int, seed: int) -> None:
    """Hold `holdout` training images out and write everything as one safetensors file."""
    fit, held = split_holdout(train.labels, holdout, seed)
    tensors = {}
    for part, images in {"fit": train[fit], "holdout": train[held], "test": test}.items():
        tensors[f"{part}.pixels"], tensors[f"{part}.labels"] = images.pixels.contiguous(), images.labels
    about = {"name": name, "classes": classes, "fingerprint": tensors_digest(tensors)}
    with atomic(path) as temporary:
        # One entry: safetensors writes several in random order, and the same images must give the same file.
        save_file(tensors, temporary, {"about": json.dumps(about)})


def load(path: Path) -> Dataset:
    """The data set that `save` wrote."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            parts = {
                n: Images(file.get_tensor(f"{n}.pixels"), file.get_tensor(f"{n}.labels"))
                for n in ("fit", "holdout", "test")
            }
        return Dataset(about["name"], about["classes"], fingerprint=about["fingerprint"], **parts)
    except FileNotFoundError:
        raise UserError(f"data file {path} does not exist; run the data stage (dvc repro) first") from None
    except Exception as error:
        raise UserError(f"data file {path} is not whole ({error}); delete it and run the data stage again") from None
