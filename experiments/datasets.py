"""The data sets: scikit-learn's digits, CIFAR-10 by download, or a folder of images."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torchvision
from PIL import Image
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch.nn import functional as F

from experiments import progress
from legr.data import Images, save
from legr.errors import UserError

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class DataSettings(BaseModel):
    """Which images an experiment uses; `folder` (or the environment) replaces the download."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["digits", "cifar10", "folder"]
    resolution: PositiveInt = 32
    holdout: PositiveInt  # training images kept from the baseline, on which the search judges
    folder: str | None = None  # has train/<class>/ and test/<class>/ (or val/<class>/)
    seed: NonNegativeInt = 0


def _digits() -> tuple[list[str], Images, Images]:
    """scikit-learn's 1,797 handwritten digits, 8×8 grey enlarged to 32×32×3; every fifth is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    pixels = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    every = Images(pixels, torch.tensor(bunch.target, dtype=torch.int64))
    test = torch.arange(len(every)) % 5 == 0
    return [str(d) for d in range(10)], every[~test], every[test]


def digits_folder(root: Path) -> Path:
    """The same digits as a folder of PNG files, as a user's own images would lie."""
    classes, train, test = _digits()
    for split, images in (("train", train), ("test", test)):
        for i, (pixels, label) in enumerate(zip(images.pixels, images.labels.tolist(), strict=True)):
            path = root / split / classes[label] / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
    return root


def _folder(root: Path, resolution: int) -> tuple[list[str], Images, Images]:
    """An ImageFolder-style tree, decoded in parallel into memory."""
    test = next((root / s for s in ("test", "val") if (root / s).is_dir()), root / "test")
    for needed in (root, root / "train", test):
        if not needed.is_dir():
            raise UserError(
                f"data folder {needed} does not exist; {root} must hold train/<class>/ and test/<class>/ "
                "(or val/<class>/)"
            )
    parts = []
    for split in (root / "train", test):
        try:
            listing = torchvision.datasets.ImageFolder(split)
        except FileNotFoundError as error:
            raise UserError(f"data folder {split} is not usable: {str(error).splitlines()[0]}") from None
        parts.append((listing.classes, _decode(listing.samples, resolution, split)))
    if parts[0][0] != parts[1][0]:
        odd = sorted(set(parts[0][0]) ^ set(parts[1][0]))
        raise UserError(f"data folder {root} has classes in only one of its splits: {', '.join(odd[:5])}")
    return parts[0][0], parts[0][1], parts[1][1]


def _decode(samples: list[tuple[str, int]], resolution: int, where: Path) -> Images:
    def read(path: str) -> np.ndarray | str:
        try:
            with Image.open(path) as image:
                image = image.convert("RGB")
                if image.size != (resolution, resolution):
                    image = image.resize((resolution, resolution), Image.Resampling.BILINEAR)
                return np.asarray(image)
        except (OSError, ValueError, Image.DecompressionBombError):
            return path

    pixels = np.empty((len(samples), resolution, resolution, 3), np.uint8)
    broken = []
    with ThreadPoolExecutor() as pool:
        paths = (path for path, _ in samples)
        for i, image in enumerate(progress.bar(pool.map(read, paths), total=len(samples), desc=where.name)):
            if isinstance(image, str):
                broken.append(image)
            else:
                pixels[i] = image
    if broken:
        raise UserError(f"data folder {where} has {len(broken)} unreadable images, the first of them {broken[0]}")
    labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
    return Images(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), labels)


def _cifar10_download(root: Path) -> tuple[list[str], Images, Images]:
    try:
        splits = [torchvision.datasets.CIFAR10(root, train=train, download=True) for train in (True, False)]
    except Exception as error:
        raise UserError(
            f"CIFAR-10 could not be downloaded into {root} ({error}); set data.folder in params.yaml "
            "or LEGR_CIFAR10 to a folder with train/<class>/ and test/<class>/"
        ) from None
    return list(splits[0].classes), *map(_in_folder_order, splits)


def _in_folder_order(split: torchvision.datasets.CIFAR10) -> Images:
    """Sorted by class and file name, as a folder of the same images is read: both give the same held-out part."""
    names: list[str] = []
    for file, _ in split.train_list if split.train else split.test_list:  # their hashes were checked
        with open(Path(split.root) / split.base_folder / file, "rb") as stream:
            names += pickle.load(stream, encoding="latin1")["filenames"]
    order = sorted(range(len(names)), key=lambda i: (split.targets[i], names[i]))
    return Images(
        torch.from_numpy(split.data[order]).permute(0, 3, 1, 2).contiguous(), torch.tensor(split.targets)[order]
    )


def prepare(settings: DataSettings, downloads: Path, path: Path) -> None:
    """Read the images once and write them as one safetensors file, whole or not at all.

    A folder named in `settings` comes first, then the environment variable LEGR_CIFAR10,
    then torchvision's download into `downloads`.
    """
    folder = settings.folder or (os.environ.get("LEGR_CIFAR10") if settings.name == "cifar10" else None)
    if settings.resolution != 32 and (settings.name == "digits" or (settings.name == "cifar10" and not folder)):
        raise UserError(f"data.resolution is {settings.resolution}; {settings.name} has images of 32 by 32")
    if settings.name == "digits":
        classes, train, test = _digits()
    elif folder or settings.name == "folder":
        if not folder:
            raise UserError("data.folder is missing; data.name 'folder' needs it: train/<class>/ and test/<class>/")
        classes, train, test = _folder(Path(folder).expanduser(), settings.resolution)
    else:
        classes, train, test = _cifar10_download(downloads)
    if settings.name == "cifar10" and classes != CIFAR10_CLASSES:
        raise UserError(
            f"data folder {folder} has classes {', '.join(classes)}; CIFAR-10 has {', '.join(CIFAR10_CLASSES)}"
        )
    if settings.name == "cifar10" and (len(train), len(test)) != (50_000, 10_000):
        raise UserError(
            f"data folder {folder} has {len(train):,} training and {len(test):,} test images; "
            "CIFAR-10 has 50,000 and 10,000"
        )
    save(path, settings.name, classes, train, test, settings.holdout, settings.seed)
