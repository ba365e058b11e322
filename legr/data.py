"""Labelled images as batches that a network takes: plain ones, and augmented ones."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from legr.files import Settings, UserError, digest, tensors_digest

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Batches = Iterator[tuple[Tensor, Tensor]]  # inputs float32 [B, 3, H, W], labels int64 [B]


class Augmentation(Settings):
    """How training images may be changed without becoming something else.

    `crop`: "pad" takes crops after zero padding by an eighth of the side (4 of 32 pixels, as is usual for
    CIFAR-10); "resized" takes a part of at least `min_area` of the image and resizes it, as is usual for ImageNet.
    """

    flip: bool = True  # mirror half of the images; False for digits
    crop: Literal["pad", "resized"] = "pad"
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.08


@dataclass(frozen=True)
class Images:
    """A labelled set in memory: `pixels` uint8 [N, 3, H, W], `labels` int64 [N], both on one device.

    Any class with these methods can take its place, such as one that decodes files in every epoch.
    """

    pixels: Tensor
    labels: Tensor
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    @property
    def side(self) -> int:
        return self.pixels.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def to(self, device: str | torch.device) -> "Images":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def load(self) -> "Images":
        """The set in memory, as it is."""
        return self

    def digest(self) -> str:
        return tensors_digest({"pixels": self.pixels, "labels": self.labels})

    def batches(self, size: int) -> Batches:
        """All images in order, normalized."""
        for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield normalize(pixels), labels

    def augmented_batches(self, size: int, generator: torch.Generator, side: int | None = None) -> Batches:
        """One shuffled epoch of random crops and horizontal flips, normalized.

        Args:
            size: batch size; an incomplete last batch is dropped, unless it is the only one.
            generator: on the CPU; decides order, crops and flips, so that every device agrees.
            side: to which crops are shrunk; None leaves them.
        """
        n = len(self)
        order = torch.randperm(n, generator=generator)[: max(n // size, 1) * size]
        flips = torch.rand(n, generator=generator) < (0.5 if self.augmentation.flip else 0)
        crop = self._padded_crops if self.augmentation.crop == "pad" else self._resized_crops
        places = torch.rand(n, 4, generator=generator)
        for index in order.split(size):
            here = index.to(self.device)
            crops = crop(self.pixels[here], places[index], flips[index])
            if side not in (None, self.side):
                crops = F.interpolate(crops.float(), size=(side, side), mode="bilinear", antialias=True)
            yield normalize(crops), self.labels[here]

    def _padded_crops(self, pixels: Tensor, places: Tensor, flips: Tensor) -> Tensor:
        side = self.side
        pad, along = side // 8, torch.arange(side)
        offsets = (places[:, :2] * (2 * pad + 1)).long()
        rows = offsets[:, :1] + along
        columns = offsets[:, 1:] + torch.where(flips[:, None], along.flip(0), along)
        picks = (torch.arange(len(pixels))[:, None, None], rows[:, :, None], columns[:, None, :])
        image, row, column = (pick.to(self.device) for pick in picks)
        # Indices around a slice put the channels last: [B, H, W, 3].
        return F.pad(pixels, (pad,) * 4)[image, :, row, column].permute(0, 3, 1, 2)

    def _resized_crops(self, pixels: Tensor, places: Tensor, flips: Tensor) -> Tensor:
        """Parts of `min_area` to all of the area, sides 3:4 to 4:3 (Szegedy et al., CVPR 2015), bilinear."""
        area = self.augmentation.min_area + (1 - self.augmentation.min_area) * places[:, 0]
        widest = torch.minimum(torch.log(torch.tensor(4 / 3)), -torch.log(area))  # no side is longer than the image's
        ratio = torch.exp((2 * places[:, 1] - 1) * widest)
        size = torch.stack([area * ratio, area / ratio], 1).sqrt()  # width, height; the image's are 1
        centre = (2 * places[:, 2:] - 1) * (1 - size)
        transform = torch.diag_embed(torch.where(flips[:, None] & torch.tensor([True, False]), -size, size))
        transform = torch.cat([transform, centre[:, :, None]], 2).to(self.device)
        grid = F.affine_grid(transform, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class Dataset:
    """What a network is trained, searched and tested on.

    `fit` and `holdout` are disjoint parts of the training images: the dense network is trained on `fit`, the
    search judges candidates on `holdout`, pruned networks are fine-tuned on all of `train`.
    """

    name: str
    classes: list[str]
    train: Images
    holdout_index: Tensor  # int64, sorted: which training images are held out
    test: Images

    @property
    def holdout(self) -> Images:
        return self.train[self.holdout_index]

    @property
    def fit(self) -> Images:
        rest = torch.ones(len(self.train), dtype=torch.bool)
        rest[self.holdout_index] = False
        return self.train[rest.nonzero()[:, 0]]

    def to(self, device: str | torch.device) -> "Dataset":
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def digest(self) -> str:
        return digest([self.train.digest(), self.test.digest(), self.holdout_index.tolist()])


def normalize(pixels: Tensor) -> Tensor:
    """Pixels of 0 to 255 [N, 3, H, W] to float32 by ImageNet's mean and standard deviation, channels last."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(1, 3, 1, 1) * 255
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def hold_out(labels: Tensor, count: int, seed: int) -> Tensor:
    """Indices [count], sorted, of images to hold out: random ones, of each class its share."""
    n = len(labels)
    if not 0 < count < n:
        raise UserError(f"holdout is {count}; it must be between 1 and {n - 1}, the training images less one")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    # The place of each image within its class, as a fraction: the smallest `count` are held out.
    within = torch.zeros(n, dtype=torch.float64)
    for label in labels.unique():
        mine = order[labels[order] == label]
        within[mine] = (torch.arange(len(mine)) + 0.5).double() / len(mine)
    return torch.argsort(within, stable=True)[:count].sort().values
