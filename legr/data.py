"""Images, in memory or streamed from disk: the held-out split, batches, and augmentation."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader

from legr.errors import UserError
from legr.files import atomic
from legr.state import tensors_digest

CPU = torch.device("cpu")
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

    def __add__(self, other: "Images") -> "Images":
        return Images(torch.cat([self.pixels, other.pixels]), torch.cat([self.labels, other.labels]))

    @property
    def device(self) -> torch.device:
        return self.pixels.device

    @property
    def side(self) -> int:
        return self.pixels.shape[-1]

    def to(self, device: str | torch.device) -> "Images":
        return Images(self.pixels.to(device), self.labels.to(device))

    def load(self) -> "Images":
        """The set in memory, as it is."""
        return self

    def first(self, count: int) -> "Images":
        """The first `count` images (all of them when there are fewer)."""
        return self[:count]

    def digest(self) -> str:
        return tensors_digest(vars(self))

    def fetch(self, batches: Iterable[Tensor], boxes: Tensor | None = None) -> Iterator[Tensor]:
        """Pixels uint8 [B, 3, H, W] of each of the index tensors `batches`, cut to `boxes` [N, 4] (see `cut`)."""
        for index in batches:
            if boxes is None:
                yield self.pixels[index.to(self.device)]
            else:
                pixels = self.pixels[index.to(self.device)].permute(0, 2, 3, 1).cpu().numpy()
                pairs = zip(pixels, boxes[index].tolist(), strict=True)
                yield torch.stack([cut(Image.fromarray(p), self.side, box) for p, box in pairs]).to(self.device)


@dataclass(frozen=True)
class Files:
    """A labelled set on disk, decoded batch by batch in worker processes: memory does not grow with its size.

    `names` holds paths below `root`, encoded, as one array [N] that worker processes share.
    """

    root: Path
    names: np.ndarray
    labels: Tensor
    side: int
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Files":
        where = index if isinstance(index, slice) else index.cpu().numpy()
        return replace(self, names=self.names[where], labels=self.labels[index])

    def __add__(self, other: "Files") -> "Files":
        names = np.concatenate([self.names, other.names])
        return replace(self, names=names, labels=torch.cat([self.labels, other.labels]))

    def to(self, device: str | torch.device) -> "Files":
        """The same files; their batches come to `device`."""
        return replace(self, device=torch.device(device), labels=self.labels.to(device))

    def load(self) -> Images:
        """Decode all of them into memory."""
        pixels = list(self.fetch(torch.arange(len(self)).split(64)))
        return Images(torch.cat(pixels), self.labels)

    def first(self, count: int) -> "Files":
        return self[:count]

    def digest(self) -> str:
        names = torch.from_numpy(np.frombuffer(b"\n".join(self.names.tolist()), np.uint8).copy())
        return tensors_digest({"names": names, "labels": self.labels, "side": torch.tensor(self.side)})

    def fetch(self, batches: Iterable[Tensor], boxes: Tensor | None = None) -> Iterator[Tensor]:
        """As `Images.fetch`; the whole image's centre where there are no `boxes`."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        plan = [index.tolist() for index in batches]
        loader = DataLoader(
            _Decoder(self, boxes), batch_sampler=plan, num_workers=min(cores, 16), collate_fn=_stack, prefetch_factor=2
        )
        for pixels in loader:
            if isinstance(pixels, UserError):
                raise pixels
            yield pixels.to(self.device, non_blocking=True)


class _Decoder(torch.utils.data.Dataset):
    """What a worker process does for `Files`."""

    def __init__(self, files: Files, boxes: Tensor | None):
        self.root, self.names, self.side, self.boxes = files.root, files.names, files.side, boxes

    def __getitem__(self, i: int) -> Tensor | UserError:
        try:
            image = read_image(self.root / os.fsdecode(self.names[i]))
        except UserError as error:
            return error  # raised, it would reach the parent process wrapped in a traceback
        return cut(image, self.side, None if self.boxes is None else self.boxes[i].tolist())


def _stack(items: list[Tensor | UserError]) -> Tensor | UserError:
    return next((item for item in items if isinstance(item, UserError)), None) or torch.stack(items)


def read_image(path: str | Path) -> Image.Image:
    """The image as RGB; raises UserError that names a file that can't be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} can't be read ({type(error).__name__}: {error})") from None


def cut(image: Image.Image, side: int, box: Sequence[float] | None = None) -> Tensor:
    """uint8 [3, side, side]: the centre square of `image`, or the part of it that `box` says, resized.

    `box` is (area, ratio, x, y): the share of the image's area, width over height, and where the part
    lies among its possible places, from 0 (left, top) to 1 (right, bottom).
    """
    if box is None:
        if image.size != (side, side):
            image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
    else:
        area, ratio, x, y = box
        pixels = area * image.width * image.height
        width, height = min((pixels * ratio) ** 0.5, image.width), min((pixels / ratio) ** 0.5, image.height)
        left, top = x * (image.width - width), y * (image.height - height)
        image = image.resize((side, side), Image.Resampling.BILINEAR, (left, top, left + width, top + height))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def random_boxes(count: int, min_area: float, generator: torch.Generator) -> Tensor:
    """[count, 4], see `cut`: from `min_area` of the area to all of it, sides 3:4 to 4:3 (Szegedy et al., CVPR 2015)."""
    draws = torch.rand(count, 4, generator=generator)
    area = min_area + (1 - min_area) * draws[:, 0]
    ratio = torch.exp((2 * draws[:, 1] - 1) * torch.log(torch.tensor(4 / 3)))
    return torch.stack([area, ratio, draws[:, 2], draws[:, 3]], 1)


@dataclass(frozen=True)
class Dataset:
    """A data set, in memory or on disk: `fit` + `holdout` are the training set, disjoint."""

    name: str
    classes: list[str]
    fit: Images | Files  # the baseline trains on these
    holdout: Images | Files  # the search judges candidates on these
    test: Images | Files  # accuracy is reported on these
    fingerprint: str  # SHA-256 of everything above

    @property
    def train(self) -> Images | Files:
        """All training images, as fine-tuning uses them."""
        return self.fit + self.holdout

    def to(self, device: str | torch.device) -> "Dataset":
        parts = {k: getattr(self, k).to(device) for k in ("fit", "holdout", "test")}
        return replace(self, **parts)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] to float32 with ImageNet's mean and standard deviation, channels last."""
    mean = torch.tensor(IMAGENET_MEAN, device=pixels.device).view(1, 3, 1, 1) * 255
    std = torch.tensor(IMAGENET_STD, device=pixels.device).view(1, 3, 1, 1) * 255
    return ((pixels.float() - mean) / std).contiguous(memory_format=torch.channels_last)


def batches(images: Images | Files, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalized batches in order, without augmentation."""
    chunks = torch.arange(len(images)).split(size)
    for index, pixels in zip(chunks, images.fetch(chunks), strict=True):
        yield normalize(pixels), images.labels[index.to(images.device)]


def augmented_batches(
    images: Images | Files,
    size: int,
    generator: torch.Generator,
    resolution: int | None = None,
    flip: bool = True,
    crop: str = "pad",
    min_area: float = 0.08,
    share: tuple[int, int] = (0, 1),
) -> Iterator[tuple[Tensor, Tensor]]:
    """One shuffled epoch of random crops and horizontal flips.

    Args:
        images: the training images; batches come to the device where they are.
        size: batch size; an incomplete last batch is dropped, unless it is the only one.
        generator: on the CPU; decides order, crops and flips, so that every device agrees.
        resolution: side to which crops are shrunk before normalization; None leaves them.
        flip: False for images that mean something else mirrored.
        crop: "pad", crops after zero padding by an eighth of the side (4 of 32 pixels, as is usual for
            CIFAR-10); "resized", a random part of the image, resized, as is usual for ImageNet.
        min_area: for "resized", the least share of the image's area.
        share: (rank, world): of each batch only every world-th image, for training in several processes.
    """
    device, n, side = images.device, len(images), images.side
    pad = side // 8 if crop == "pad" else 0
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
    flips = torch.rand(n, generator=generator) < (0.5 if flip else 0)
    boxes = random_boxes(n, min_area, generator) if crop == "resized" else None
    along = torch.arange(side)
    starts = range(0, max(n - size, 0) + 1, size)
    chunks = [order[start : start + size][share[0] :: share[1]] for start in starts]
    for index, pixels in zip(chunks, images.fetch(chunks, boxes), strict=True):
        padded = F.pad(pixels, (pad,) * 4)
        rows = offsets[0, index, None] + along
        columns = offsets[1, index, None] + torch.where(flips[index, None], side - 1 - along, along)
        picks = (torch.arange(len(index))[:, None, None], rows[:, :, None], columns[:, None, :])
        here = [p.to(device) for p in picks]
        # Indices around a slice put the channels last: [B, H, W, 3].
        crops = padded[here[0], :, here[1], here[2]].permute(0, 3, 1, 2)
        if resolution is not None and resolution != side:
            crops = F.interpolate(crops.float(), size=(resolution,) * 2, mode="bilinear", antialias=True)
        yield normalize(crops), images.labels[index.to(device)]


def in_turn(labels: Tensor) -> Tensor:
    """An order [N] in which the classes take turns: of each the first n images hold its share of all, nearly."""
    place = torch.empty(len(labels))
    for label in labels.unique():
        mine = (labels == label).nonzero()[:, 0]
        place[mine] = (torch.arange(len(mine)) + 0.5) / len(mine)
    return place.argsort(stable=True)


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


def save(
    path: Path,
    name: str,
    classes: list[str],
    train: Images | Files,
    test: Images | Files,
    holdout: int,
    seed: int,
) -> None:
    """Hold `holdout` training images out and write everything as one safetensors file.

    Of `Files` it holds their names and labels, not their pixels.
    """
    fit, held = split_holdout(train.labels, holdout, seed)
    tensors, places = {}, {}
    for part, images in {"fit": train[fit], "holdout": train[held], "test": test}.items():
        if isinstance(images, Files):
            names = b"\n".join(images.names.tolist())
            tensors[f"{part}.names"] = torch.from_numpy(np.frombuffer(names, np.uint8).copy())
            places[part] = {"root": str(images.root), "side": images.side}
        else:
            tensors[f"{part}.pixels"] = images.pixels.contiguous()
        tensors[f"{part}.labels"] = images.labels
    about = {"name": name, "classes": classes, "fingerprint": tensors_digest(tensors)}
    if places:
        about["files"] = places
    with atomic(path) as temporary:
        # One entry: safetensors writes several in random order, and the same images must give the same file.
        save_file(tensors, temporary, {"about": json.dumps(about)})


def load(path: Path) -> Dataset:
    """The data set that `save` wrote."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["about"])
            parts = {}
            for part in ("fit", "holdout", "test"):
                labels = file.get_tensor(f"{part}.labels")
                if place := about.get("files", {}).get(part):
                    names = file.get_tensor(f"{part}.names").numpy().tobytes().split(b"\n")
                    parts[part] = Files(Path(place["root"]), np.array(names), labels, place["side"])
                else:
                    parts[part] = Images(file.get_tensor(f"{part}.pixels"), labels)
        return Dataset(about["name"], about["classes"], fingerprint=about["fingerprint"], **parts)
    except FileNotFoundError:
        raise UserError(f"data file {path} does not exist; run the data stage (dvc repro) first") from None
    except Exception as error:
        raise UserError(f"data file {path} is not whole ({error}); delete it and run the data stage again") from None
