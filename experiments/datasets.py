"""The data sets: scikit-learn's digits, CIFAR-10 or Imagenette by download, ILSVRC2012, or a folder of images."""

import os
import pickle
import tarfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt
from torch.nn import functional as F

from experiments import progress
from legr.data import Files, Images, cut, read_image, save
from legr.errors import UserError
from legr.models import imagenet_rows

CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class DataSettings(BaseModel):
    """Which images an experiment uses; `folder` (or LEGR_<NAME> in the environment) replaces the download."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["digits", "cifar10", "imagenette", "imagenet", "folder"]
    resolution: PositiveInt = 32
    stream: bool = False  # decode in every epoch instead of once into memory; "imagenet" always does
    holdout: PositiveInt  # training images kept from the baseline, on which the search judges
    folder: str | None = None  # has train/<class>/ and test/<class>/ (or val/<class>/)
    seed: NonNegativeInt = 0


def _digits(side: int = 32) -> tuple[list[str], Images, Images]:
    """scikit-learn's 1,797 handwritten digits, 8×8 grey enlarged to side×side×3; every fifth is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    large = F.interpolate(grey, size=(side, side), mode="bilinear", align_corners=False)
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


def _folder(root: Path, resolution: int, stream: bool) -> tuple[list[str], Images | Files, Images | Files]:
    """An ImageFolder-style tree: decoded in parallel into memory, or listed and checked to be streamed."""
    from torchvision.datasets import ImageFolder

    test = next((root / s for s in ("test", "val") if (root / s).is_dir()), root / "test")
    for needed in (root, root / "train", test):
        if not needed.is_dir():
            raise UserError(
                f"data folder {needed} does not exist; {root} must hold train/<class>/ and test/<class>/ "
                "(or val/<class>/)"
            )
    for split in (root / "train", test):
        _check_links(split)
    parts = []
    for split in (root / "train", test):
        try:
            listing = ImageFolder(split)
        except FileNotFoundError as error:
            raise UserError(f"data folder {split} is not usable: {str(error).splitlines()[0]}") from None
        parts.append((listing.classes, (_listed if stream else _decoded)(listing.samples, resolution, split)))
    if parts[0][0] != parts[1][0]:
        odd = sorted(set(parts[0][0]) ^ set(parts[1][0]))
        raise UserError(f"data folder {root} has classes in only one of its splits: {', '.join(odd[:5])}")
    return parts[0][0], parts[0][1], parts[1][1]


def _check_links(folder: Path) -> None:
    """Raises UserError where a link leads back to a folder that holds it: reading would go round in circles."""
    for here, folders, _ in os.walk(folder, followlinks=True):
        for name in folders:
            path = Path(here, name)
            if path.is_symlink() and Path(here).resolve().is_relative_to(path.resolve()):
                raise UserError(f"data folder {path} is a link to a folder that it lies in; remove it")


def _decoded(samples: list[tuple[str, int]], resolution: int, where: Path) -> Images:
    size, room = len(samples) * 3 * resolution**2, psutil.virtual_memory().available
    if size > room:
        raise UserError(
            f"data folder {where} has {len(samples):,} images, {size / 2**30:.1f} GiB at {resolution}×{resolution} "
            f"pixels; {room / 2**30:.1f} GiB of memory are free: set data.stream to true, or a smaller resolution"
        )
    pixels = torch.empty(len(samples), 3, resolution, resolution, dtype=torch.uint8)

    def read(i: int) -> None:
        pixels[i] = cut(read_image(samples[i][0]), resolution)

    _all(read, len(samples), where)
    return Images(pixels, torch.tensor([label for _, label in samples], dtype=torch.int64))


def _listed(samples: list[tuple[str, int]], resolution: int, where: Path) -> Files:
    def check(i: int) -> None:
        try:
            with Image.open(samples[i][0]):
                pass
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise UserError(str(error)) from None

    _all(check, len(samples), where)
    names = np.array([os.fsencode(os.path.relpath(path, where)) for path, _ in samples])
    return Files(where.absolute(), names, torch.tensor([label for _, label in samples], dtype=torch.int64), resolution)


def _all(check: Callable[[int], None], count: int, where: Path) -> None:
    """Run `check` for every image in parallel, with a progress bar; then name and count those that fail."""

    def failures_of(some: range) -> list[str]:
        found = []
        for i in some:
            try:
                check(i)
            except UserError as error:
                found.append(str(error))
        return found

    # Many in one task: a pool keeps kilobytes for each task, and ILSVRC2012 has over a million images.
    tasks = [range(start, min(start + 250, count)) for start in range(0, count, 250)]
    failures: list[str] = []
    with ThreadPoolExecutor() as pool, progress.bar(total=count, desc=where.name) as bar:
        for some, found in zip(tasks, pool.map(failures_of, tasks), strict=True):
            failures += found
            bar.update(len(some))
    if failures:
        raise UserError(f"data folder {where} has {len(failures)} unreadable images, the first of them: {failures[0]}")


def _cifar10_download(root: Path) -> tuple[list[str], Images, Images]:
    """torchvision's CIFAR-10, checked by hash."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import download_url

    try:
        download_url(CIFAR10.url, str(root), CIFAR10.filename, CIFAR10.tgz_md5)
    except Exception as error:
        raise UserError(
            f"CIFAR-10 could not be downloaded into {root} ({error}); set data.folder in params.yaml "
            "or LEGR_CIFAR10 to a folder with train/<class>/ and test/<class>/"
        ) from None
    return CIFAR10_CLASSES, *cifar10_archive(root / CIFAR10.filename)


def cifar10_archive(path: Path) -> tuple[Images, Images]:
    """Training and test images of CIFAR-10's Python archive; nothing is unpacked, and no pickled code is run.

    Sorted by class and file name, as a folder of the same images is read: both give the same held-out part.
    """
    parts = []
    with tarfile.open(path) as archive:
        for files in ([f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]):
            entries = [
                _Arrays(archive.extractfile(f"cifar-10-batches-py/{f}"), encoding="latin1").load() for f in files
            ]
            names = [name for entry in entries for name in entry["filenames"]]
            labels = [label for entry in entries for label in entry["labels"]]
            order = sorted(range(len(names)), key=list(zip(labels, names, strict=True)).__getitem__)
            pixels = torch.from_numpy(np.concatenate([entry["data"] for entry in entries])[order])
            parts.append(Images(pixels.view(-1, 3, 32, 32), torch.tensor(labels)[order]))
    return parts[0], parts[1]


class _Arrays(pickle.Unpickler):
    """Reads NumPy arrays and plain values; anything else that a pickle names is refused, not called."""

    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core", "numpy._core")
        if (module, name) not in {
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            raise pickle.UnpicklingError(f"{module}.{name} is not a part of an image archive")
        return super().find_class(module, name)


def _imagenette_download(root: Path) -> Path:
    """torchvision's Imagenette, shorter side 160 pixels, checked by hash; returns its folder."""
    from torchvision.datasets import Imagenette

    try:
        for split in ("train", "val"):
            Imagenette(root, split, "160px", download=True)
    except Exception as error:
        raise UserError(
            f"Imagenette could not be downloaded into {root} ({error}); set data.folder in params.yaml "
            "or LEGR_IMAGENETTE to a folder with train/<WordNet id>/ and val/<WordNet id>/"
        ) from None
    return root / "imagenette2-160"


def prepare(settings: DataSettings, downloads: Path, path: Path) -> None:
    """Read the images once and write them as one safetensors file, whole or not at all.

    A folder named in `settings` comes first, then the environment variable LEGR_<NAME> (LEGR_CIFAR10,
    LEGR_IMAGENETTE, LEGR_IMAGENET), then torchvision's download into `downloads`. Of images that are
    streamed the file holds the names; the headers of all are checked.
    """
    name = settings.name
    folder = settings.folder
    if not folder and name not in ("digits", "folder"):
        folder = os.environ.get(f"LEGR_{name.upper()}")
    if settings.resolution != 32 and name == "cifar10" and not folder:
        raise UserError(f"data.resolution is {settings.resolution}; {name} has images of 32 by 32")
    stream = settings.stream or name == "imagenet"
    if not folder and name in ("folder", "imagenet"):
        raise UserError(
            f"data.folder is missing; data.name {name!r} needs it: train/<class>/ and test/<class>/ (or val/<class>/)"
        )
    if name == "digits":
        classes, train, test = _digits(settings.resolution)
    elif name == "cifar10" and not folder:
        classes, train, test = _cifar10_download(downloads)
    else:
        root = Path(folder).expanduser() if folder else _imagenette_download(downloads)
        classes, train, test = _folder(root, settings.resolution, stream)
    if name == "cifar10" and classes != CIFAR10_CLASSES:
        raise UserError(
            f"data folder {folder} has classes {', '.join(classes)}; CIFAR-10 has {', '.join(CIFAR10_CLASSES)}"
        )
    if name == "cifar10" and (len(train), len(test)) != (50_000, 10_000):
        raise UserError(
            f"data folder {folder} has {len(train):,} training and {len(test):,} test images; "
            "CIFAR-10 has 50,000 and 10,000"
        )
    if name in ("imagenette", "imagenet"):
        imagenet_rows(classes)
    save(path, name, classes, train, test, settings.holdout, settings.seed)
