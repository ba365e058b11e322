"""The data sets: a row of `DATASETS` each. `prepare` reads the images once; `load` gives them to the notebooks."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from experiments.settings import DataSettings
from legr.data import Dataset, ImageFiles, Images, hold_out
from legr.files import UserError, digest, load_state, read_json, save_state, write_json

LOOP = "link that leads back"
CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# Classes, training and test images; of each split, how many files were left out by kind.
Read = tuple[list[str], Images, Images, dict[str, Counter]]


@dataclass(frozen=True)
class Source:
    """Where a data set comes from."""

    read: Callable[[DataSettings, Path], Read]  # takes the folder for downloads
    title: str
    note: str = ""  # for captions


def digits(settings: DataSettings, _: Path | None = None) -> Read:
    """scikit-learn's 1,797 handwritten digits, 8×8 grey, enlarged; every third is a test image."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    grey = torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 16
    # Noise, without which all of them are easy and all networks the same.
    grey += 0.15 * torch.randn(grey.shape, generator=torch.Generator().manual_seed(0))
    large = F.interpolate(grey.clamp(0, 1), size=settings.shape[1:], mode="bilinear", align_corners=False)
    pixels = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    every = Images(pixels, torch.tensor(bunch.target, dtype=torch.int64))
    test = torch.arange(len(every)) % 3 == 0
    return [str(d) for d in range(10)], every[~test], every[test], {}


def cifar10(settings: DataSettings, downloads: Path) -> Read:
    """From a folder, or torchvision's download, checked by hash; sorted by class, as a folder is read."""
    from torchvision.datasets import CIFAR10

    left_out = {}
    if _folder_of(settings):
        classes, train, test, left_out = folder(settings, downloads)
    else:
        if settings.shape != (3, 32, 32):
            raise UserError(f"data.resolution is {settings.resolution}; cifar10 has images of 32 by 32, in colour")
        splits = [_downloaded(CIFAR10, settings, downloads, train=train) for train in (True, False)]
        pixels = [torch.tensor(split.data).permute(0, 3, 1, 2).contiguous() for split in splits]
        every = (Images(x, torch.tensor(split.targets)) for x, split in zip(pixels, splits, strict=True))
        classes, (train, test) = splits[0].classes, (images[images.labels.argsort(stable=True)] for images in every)
    if classes != CIFAR10_CLASSES or (len(train), len(test)) != (50_000, 10_000):
        raise UserError(
            f"data folder {_folder_of(settings)} has {len(train):,} training and {len(test):,} test images of "
            f"{', '.join(classes[:12])}; CIFAR-10 has 50,000 and 10,000 of {', '.join(CIFAR10_CLASSES)}"
        )
    return classes, train, test, left_out


def imagenette(settings: DataSettings, downloads: Path) -> Read:
    """From a folder, or torchvision's download (the shorter side has 160 pixels), checked by hash."""
    from torchvision.datasets import Imagenette

    if not _folder_of(settings):
        for split in ("train", "val"):
            _downloaded(Imagenette, settings, downloads, split=split, size="160px")
        settings = settings.model_copy(update={"folder": str(downloads / "imagenette2-160")})
    return folder(settings, downloads)


def imagenet(settings: DataSettings, downloads: Path) -> Read:
    """ILSVRC2012 from a folder, streamed: 1,000 classes, sorted by WordNet id as torchvision's networks have them."""
    return folder(settings.model_copy(update={"stream": True}), downloads)


def folder(settings: DataSettings, _: Path | None = None) -> Read:
    """train/<class>/ and test/<class>/ (or val/, valid/): decoded into memory, or listed to be streamed."""
    source = _folder_of(settings)
    if not source:
        raise UserError(f"data.folder is missing; data.name {settings.name!r} needs a folder with train/<class>/")
    root = Path(source).expanduser()
    splits = [root / "train", next((root / s for s in ("test", "val", "valid") if (root / s).is_dir()), root / "test")]
    parts, left_out = [], {}
    for name, split in zip(("train", "test"), splits, strict=True):
        try:
            classes, paths, labels, left_out[name] = _listing(split)
            sizes = [os.path.getsize(path) for path in paths]
        except OSError as error:
            raise UserError(
                f"data folder {split} can't be used ({error}); "
                f"{root} must hold train/<class>/ and test/<class>/ (or val/<class>/)"
            ) from None
        names = np.array([os.fsencode(os.path.relpath(path, split)) for path in paths])
        names = torch.from_numpy(names.view(np.uint8).reshape(len(names), -1))
        files = ImageFiles(
            str(split.absolute()),
            names,
            labels=torch.tensor(labels),
            sizes=torch.tensor(sizes),
            shape=settings.shape,
            augmentation=settings.augmentation,
            normalization=settings.normalization,
        )
        parts.append((classes, paths, files if settings.stream else files.load()))
    (classes, paths, train), (in_test, test_paths, test) = parts
    if classes != in_test:
        odd = sorted(set(classes) ^ set(in_test))
        raise UserError(f"data folder {root} has classes in only one of its splits: {', '.join(odd[:5])}")
    known = dict(zip(_digests(train), paths, strict=True))
    twins = [(path, known[each]) for path, each in zip(test_paths, _digests(test), strict=True) if each in known]
    if twins:
        named = [" = ".join(os.path.relpath(path, root) for path in pair) for pair in twins[:10]]
        if len(twins) > len(named):
            named.append("…")
        print(f"test images that are training images too, by the pixels read: {len(twins)} ({', '.join(named)})")
    return classes, train, test, left_out


def _digests(images: Images) -> Iterator[bytes]:
    """Of each image, as a network takes it."""
    for inputs, _ in images.batches(64):
        for each in inputs.numpy():
            yield hashlib.blake2b(each.tobytes(), digest_size=16).digest()


def _listing(split: Path) -> tuple[list[str], list[str], list[int], Counter]:
    """Classes, paths of images and their labels; how many files, hidden folders and links are left out, by kind."""
    above = {os.path.realpath(split), *map(str, split.resolve().parents)}
    classes, left_out = {}, Counter()
    for name in sorted(os.listdir(split)):
        path, kind = os.path.realpath(split / name), _kind(name)
        if path in above:
            left_out[LOOP] += 1
        elif os.path.isdir(path) and kind != "hidden":
            classes[name] = path
        else:
            left_out["image in no class" if kind == "image" else kind] += 1
    if not classes:
        raise FileNotFoundError("it has no folder of a class")
    images, seen = [], above | set(classes.values())
    for label, (name, path) in enumerate(classes.items()):
        seen.remove(path)  # only the class itself may go there
        for here, folders, files in _walk(split / name, seen, left_out):
            hidden = {folder for folder in folders if _kind(folder) == "hidden"}
            folders[:] = [folder for folder in folders if folder not in hidden]
            for file in [*files, *hidden]:
                if (kind := _kind(file)) == "image":
                    images.append((label, here, file))
                else:
                    left_out[kind] += 1
        if not images or images[-1][0] != label:
            raise FileNotFoundError(f"it has no image of {name}")
    labels, folders, files = zip(*sorted(images), strict=True)
    return list(classes), list(map(os.path.join, folders, files)), list(labels), left_out


def _kind(name: str) -> str:
    """Of a file, by its name: image, hidden, or another suffix."""
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if name.startswith("."):
        return "hidden"
    suffix = Path(name).suffix.lower()
    return "image" if suffix in IMG_EXTENSIONS else suffix or "without a suffix"


def _walk(top: str | Path, seen: set[str], left_out: Counter) -> Iterator[tuple[str, list[str], list[str]]]:
    """As os.walk, by name and through links, but into no folder that was `seen`: links may lead back."""
    for here, folders, files in os.walk(top, followlinks=True):
        if (real := os.path.realpath(here)) in seen:
            left_out[LOOP] += 1
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield here, folders, sorted(files)


def _folder_of(settings: DataSettings) -> str | None:
    return settings.folder or os.environ.get(f"LEGR_{settings.name.upper()}")


def _downloaded(dataset: Callable, settings: DataSettings, downloads: Path, **options: Any) -> Any:
    """One of torchvision's data sets."""
    try:
        return dataset(downloads, download=True, **options)
    except Exception as error:
        raise UserError(
            f"{settings.name} could not be downloaded ({error}); set data.folder in params.yaml or "
            f"LEGR_{settings.name.upper()} to a folder with train/<class>/ and test/<class>/ (or val/<class>/)"
        ) from None


DATASETS = {
    "digits": Source(digits, "digits", " (they show that it runs, and nothing about LeGR)"),
    "cifar10": Source(cifar10, "CIFAR-10"),
    "imagenette": Source(imagenette, "Imagenette", " (10 classes of ImageNet)"),
    "imagenet": Source(imagenet, "ImageNet"),
    "folder": Source(folder, "own images"),
}


def about(settings: DataSettings) -> str:
    """The data set and the size of its images, for captions."""
    source, (_, height, width) = DATASETS[settings.name], settings.shape
    return f"{source.title}{source.note}, {height}×{width}"


def prepare(settings: DataSettings, downloads: Path, path: Path) -> None:
    """Read the images and write them as one file; of images that are streamed, their names.

    A folder named in `settings` comes first, then the environment variable LEGR_<NAME>, then torchvision's download.
    What the folder held is noted in a file beside `path`, for `check_unchanged`.
    """
    source = _folder_of(settings)
    held = {"folder": os.path.abspath(Path(source).expanduser()), "files": _contents(source)} if source else {}
    classes, train, test, left_out = DATASETS[settings.name].read(settings, downloads)
    holdout = hold_out(train.labels, settings.holdout, settings.seed)
    labels = {"train": train.labels, "of it held out": train.labels[holdout], "test": test.labels}
    counts = {split: each.bincount(minlength=len(classes)) for split, each in labels.items()}
    table = pd.DataFrame(counts, classes)
    alone = table.index[table["train"] == table["of it held out"]]
    if len(alone):
        raise UserError(
            f"holdout is {settings.holdout}; it leaves no image to train on of {', '.join(alone[:5])}: "
            "hold out fewer images, or add some of these classes"
        )
    rest = pd.DataFrame(left_out).sort_index().add_prefix("left out: ", axis=0)
    table = pd.concat([table, table.sum().to_frame("all").T, rest]).fillna(0).astype(int)
    print(table.to_string(max_rows=40))
    state = {"settings": settings.model_dump(), "classes": classes, "holdout": holdout}
    for split, images in {"train": train, "test": test}.items():
        kept = ("root", "names", "labels", "sizes", "shape") if isinstance(images, ImageFiles) else ("pixels", "labels")
        state[split] = {name: getattr(images, name) for name in kept}
    save_state(path, state)
    write_json(path.with_suffix(".json"), held)


def _contents(folder: str) -> str:
    """Names a folder's files by their paths, sizes and times of change."""
    root, facts = Path(folder).expanduser(), []
    for here, _, files in _walk(root, set(), Counter()):
        for path in (os.path.join(here, name) for name in files):
            stat = os.stat(path, follow_symlinks=os.path.exists(path))
            facts.append((os.path.relpath(path, root), stat.st_size, stat.st_mtime_ns))
    return digest(facts)


def check_unchanged(settings: DataSettings, path: Path) -> None:
    """Raise UserError if the folder of images is not as it was when `prepare` wrote `path`.

    That is the folder that is named now (see `prepare`); where none is, the one that was read, if it is still there.
    """
    note = path.with_suffix(".json")
    if not path.exists() or not note.exists():
        return
    held = read_json(note, "folder that images were read from")
    source = _folder_of(settings) or held.get("folder")
    if source is None or (not _folder_of(settings) and not Path(source).is_dir()):
        return
    if not held or _contents(source) != held["files"]:
        stage = f"data@{path.parent.name}-{path.stem}"
        read = f"they were read from {held['folder']}" if held else "they were downloaded"
        raise UserError(
            f"images in {source} are not those in {path} ({read}, and files, sizes or times differ); "
            f"prepare them anew: dvc repro -f -s {stage}"
        )


def load(path: Path, settings: DataSettings) -> Dataset:
    """The images that `prepare` wrote for these settings."""
    state = load_state(path)
    if state is None:
        raise UserError(f"images {path} do not exist; run the data stage (dvc repro) first")
    if state["settings"] != settings.model_dump():
        raise UserError(f"images {path} were prepared with other settings; run the data stage (dvc repro) again")
    train, test = (
        (ImageFiles if "root" in split else Images)(
            **split, augmentation=settings.augmentation, normalization=settings.normalization
        )
        for split in (state["train"], state["test"])
    )
    return Dataset(settings.name, state["classes"], train, state["holdout"], test)
