"""Labelled images as batches that a network takes: plain ones, and augmented ones."""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from legr.files import Settings, UserError, digest, tensor_of, tensors_digest

Batches = Iterator[tuple[Tensor, Tensor]]  # inputs float32 [B, C, H, W], labels int64 [B]
NORMALIZATIONS = {
    "imagenet": {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)},
    "none": {"mean": (0,), "std": (1,)},  # inputs of 0 to 1
    "raw": {"mean": (0,), "std": (1 / 255,)},  # inputs of 0 to 255
}


class Normalization(Settings):
    """What the network was trained on: (pixel / 255 - mean) / std, with one number for each channel or for all.

    `Normalization.model_validate("none")` and the other names of `NORMALIZATIONS` stand for the usual ones.
    """

    mean: Annotated[tuple[float, ...], Field(min_length=1)] = NORMALIZATIONS["imagenet"]["mean"]
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = NORMALIZATIONS["imagenet"]["std"]

    @model_validator(mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        if isinstance(value, str) and value not in NORMALIZATIONS:
            raise ValueError(f"it must be {', '.join(NORMALIZATIONS)}, or have mean and std")
        return NORMALIZATIONS[value] if isinstance(value, str) else value

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels of 0 to 255 [N, C, H, W] as a network takes them: float32, channels last."""
        mean, std = _on(self, pixels.device)
        return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.lru_cache
def _on(normalization: Normalization, device: torch.device) -> list[Tensor]:
    """Mean and standard deviation [1, C, 1, 1] of pixels of 0 to 255."""
    values = (normalization.mean, normalization.std)
    return [torch.tensor(value, device=device).view(1, -1, 1, 1) * 255 for value in values]


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
    """A labelled set in memory: `pixels` uint8 [N, C, H, W], `labels` int64 [N], both on one device.

    `ImageFiles` has the same methods for images on disk, and any class that has them can take its place.

    Raises:
        UserError: pixels or labels have another type or shape; `normalization` is for another number of channels.
    """

    pixels: Tensor
    labels: Tensor
    augmentation: Augmentation = field(default_factory=Augmentation)
    normalization: Normalization = field(default_factory=Normalization)

    def __post_init__(self):
        for name, dtype, dims in (("labels", torch.int64, 1), ("pixels", torch.uint8, 4)):
            tensor = tensor_of(getattr(self, name), name)
            object.__setattr__(self, name, tensor)
            if tensor.dtype != dtype or tensor.dim() != dims or len(tensor) != len(self.labels):
                shape = f"[N, C, H, W], with {len(self.labels)} labels" if name == "pixels" else "[N]"
                raise UserError(f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {dtype} {shape}")
        check_set(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        return replace(self, pixels=self.pixels[index], labels=self.labels[index])

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return tuple(self.pixels.shape[1:])

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    def to(self, device: str | torch.device) -> "Images":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def load(self) -> "Images":
        """The set in memory, as it is."""
        return self

    def digest(self) -> str:
        return digest([tensors_digest({"pixels": self.pixels, "labels": self.labels}), self.normalization.model_dump()])

    def batches(self, size: int) -> Batches:
        """All images in order, normalized."""
        for pixels, labels in zip(self.pixels.split(size), self.labels.split(size), strict=True):
            yield self.normalization(pixels), labels

    def augmented_batches(self, size: int, generator: torch.Generator, side: int | None = None) -> Batches:
        """One shuffled epoch of random crops and horizontal flips, normalized.

        Args:
            size: batch size; an incomplete last batch is dropped, unless it is the only one.
            generator: on the CPU; decides order, crops and flips, so that every device agrees.
            side: to which the shorter side of crops is shrunk; None leaves them.
        """
        n = len(self)
        order = torch.randperm(n, generator=generator)[: max(n // size, 1) * size]
        flips = torch.rand(n, generator=generator) < (0.5 if self.augmentation.flip else 0)
        places = torch.rand(n, 4, generator=generator)
        if self.augmentation.crop == "pad":
            crop, drawn = self._padded_crops, torch.cat([self._offsets(places), flips[:, None]], 1)
        else:
            crop, drawn = self._resized_crops, self._transforms(places, flips)
        order, drawn = order.to(self.device), drawn.to(self.device)  # once an epoch, so that no step waits
        for index in order.split(size):
            crops = crop(self.pixels[index], drawn[index])
            if side is not None and side != min(self.shape[1:]):
                crops = F.interpolate(crops.float(), size=shrunk(self.shape, side), mode="bilinear", antialias=True)
            yield self.normalization(crops), self.labels[index]

    def _offsets(self, places: Tensor) -> Tensor:
        """The first row and column of each crop out of the padded image, int64 [N, 2]."""
        _, height, width = self.shape
        return (places[:, :2] * torch.tensor([2 * (height // 8) + 1, 2 * (width // 8) + 1])).long()

    def _padded_crops(self, pixels: Tensor, drawn: Tensor) -> Tensor:
        _, height, width = self.shape
        images, down, along = (torch.arange(n, device=self.device) for n in (len(pixels), height, width))
        rows = drawn[:, :1] + down
        columns = drawn[:, 1:2] + torch.where(drawn[:, 2:] > 0, along.flip(0), along)
        padded = F.pad(pixels, (width // 8, width // 8, height // 8, height // 8))
        # Indices around a slice put the channels last: [B, H, W, C].
        return padded[images[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _transforms(self, places: Tensor, flips: Tensor) -> Tensor:
        """Affine maps [N, 2, 3] to parts of `min_area` to all of the area, proportions 3:4 to 4:3 of the image's own.

        Szegedy et al., CVPR 2015.
        """
        area = self.augmentation.min_area + (1 - self.augmentation.min_area) * places[:, 0]
        widest = torch.minimum(torch.log(torch.tensor(4 / 3)), -torch.log(area))  # no side is longer than the image's
        ratio = torch.exp((2 * places[:, 1] - 1) * widest)
        size = torch.stack([area * ratio, area / ratio], 1).sqrt()  # width, height; the image's are 1
        centre = (2 * places[:, 2:] - 1) * (1 - size)
        transform = torch.diag_embed(torch.where(flips[:, None] & torch.tensor([True, False]), -size, size))
        return torch.cat([transform, centre[:, :, None]], 2)

    def _resized_crops(self, pixels: Tensor, transforms: Tensor) -> Tensor:
        grid = F.affine_grid(transforms, list(pixels.shape), align_corners=False)
        return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)


def check_set(images: "Images | ImageFiles") -> None:
    """Raise UserError unless there are images, and their normalization is for as many channels as they have."""
    if not len(images):
        raise UserError("labels has no images; a set must have one or more")
    for name in ("mean", "std"):
        if (count := len(getattr(images.normalization, name))) not in (1, images.shape[0]):
            raise UserError(f"normalization.{name} has {count} numbers; the images have {images.shape[0]} channels")


def shrunk(shape: tuple[int, int, int], side: int) -> tuple[int, int]:
    """Height and width when the shorter one becomes `side`."""
    return tuple(round(length * side / min(shape[1:])) for length in shape[1:])


@dataclass(frozen=True)
class ImageFiles(torch.utils.data.Dataset):
    """`Images` on disk, decoded by worker processes in every epoch: memory does not grow with the data set.

    `names` are paths below `root`, encoded and filled up with zeros: uint8 [N, longest], which workers share.
    `transform` makes of an image one of height×width; None takes the largest part of these proportions in its middle.
    """

    root: str
    names: Tensor
    labels: Tensor
    sizes: Tensor  # of the files in bytes, int64 [N]
    shape: tuple[int, int, int]  # channels, height and width
    augmentation: Augmentation = field(default_factory=Augmentation)
    normalization: Normalization = field(default_factory=Normalization)
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable) where batches come to
    transform: Callable | None = None

    def __post_init__(self):
        check_set(self)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice | int):
        """A part of the set; of a whole number, as DataLoader asks, one decoded image with its label."""
        if isinstance(index, int):
            path = Path(self.root, os.fsdecode(self.names[index].numpy().tobytes().rstrip(b"\0")))
            channels, height, width = self.shape
            image = _read_image(path, channels)
            fit = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            image = fit if self.transform is None else self.transform(image)
            return torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1), self.labels[index]
        return replace(self, names=self.names[index], labels=self.labels[index], sizes=self.sizes[index])

    def to(self, device: str | torch.device) -> "ImageFiles":
        return replace(self, device=torch.device(device))

    def load(self) -> Images:
        """Decode all of them into memory."""
        pixels = torch.cat([pixels for pixels, _ in self._decoded(64)])
        return Images(pixels, self.labels, self.augmentation, self.normalization).to(self.device)

    def digest(self) -> str:
        names = tensors_digest({"names": self.names, "labels": self.labels, "sizes": self.sizes})
        return digest([names, self.shape, self.normalization.model_dump()])

    def batches(self, size: int, generator: torch.Generator | None = None) -> Batches:
        for pixels, labels in self._decoded(size, generator):
            inputs = self.normalization(pixels.to(self.device, non_blocking=True))
            yield inputs, labels.to(self.device, non_blocking=True)

    def augmented_batches(self, size: int, generator: torch.Generator, side: int | None = None) -> Batches:
        from torchvision.transforms import v2

        _, height, width = self.shape
        to = (height, width) if side is None else shrunk(self.shape, side)
        if self.augmentation.crop == "pad":
            fit = functools.partial(ImageOps.fit, size=(width, height), method=Image.Resampling.BILINEAR)
            steps = [fit, v2.RandomCrop((height, width), padding=(width // 8, height // 8)), v2.Resize(to)]
        else:
            steps = [v2.RandomResizedCrop(to, (self.augmentation.min_area, 1.0))]
        steps += [v2.RandomHorizontalFlip()] if self.augmentation.flip else []
        shuffled = self[torch.randperm(len(self), generator=generator)[: max(len(self) // size, 1) * size]]
        yield from replace(shuffled, transform=v2.Compose(steps)).batches(size, generator)

    def _decoded(self, size: int, generator: torch.Generator | None = None) -> Batches:
        workers = min(os.cpu_count() or 1, 16, max(len(self) // 500, 1))
        pinned = self.device.type == "cuda"
        try:
            yield from DataLoader(self, size, num_workers=workers, generator=generator, pin_memory=pinned)
        except UserError as error:  # the loader wraps it in the worker's traceback
            error.with_traceback(None)  # which would hold the loader, and so its processes
            raise UserError(str(error).strip().rsplit("UserError: ", 1)[-1]) from None


def _read_image(path: Path, channels: int) -> Image.Image:
    """Turned as its EXIF tag says; 16 bits are scaled to 8; what is transparent lies on white."""
    try:
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if file.mode.startswith("I;16") or (file.mode, file.format) == ("I", "PPM"):
                image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
            elif file.mode in ("I", "F"):
                raise ValueError("its pixels have 32 bits, of which 0 and 255 are unknown; save it with 8 or 16")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB" if channels == 3 else "L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} can't be read ({type(error).__name__}: {error})") from None


@dataclass(frozen=True)
class Dataset:
    """What a network is trained, searched and tested on.

    `fit` and `holdout` are disjoint parts of the training images: networks are trained on `fit`, the search judges
    candidates on `holdout`.
    """

    name: str
    classes: list[str]
    train: Images
    holdout_index: Tensor  # int64, sorted: which training images are held out
    test: Images

    def __post_init__(self):
        for name in ("train", "test"):
            images = getattr(self, name)
            if not 0 <= images.labels.min() <= images.labels.max() < len(self.classes):
                least, most = images.labels.min(), images.labels.max()
                raise UserError(f"{name} has labels {least} to {most}; there are {len(self.classes)} classes")
        if not 0 < len(self.holdout_index) < len(self.train):
            allowed = f"between 1 and {len(self.train) - 1}, the training images less one"
            raise UserError(f"holdout_index has {len(self.holdout_index)} images; it must have {allowed}")
        (one, scaled), (other, also) = ((images.shape, images.normalization) for images in (self.train, self.test))
        if one != other or scaled != also:
            raise UserError(f"train has images {list(one)}, test {list(other)}; shape and normalization must be equal")

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
