"""Some images of an experiment in one small committed file: enough to judge pruned networks without the data set."""

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from experiments.experiment import Experiment
from legr.data import Images
from legr.files import UserError, atomic

TEST, TRAIN = 500, 256  # images to judge on, and to re-estimate BatchNorm's statistics from
QUALITY = {32: "lossless", 128: 95, 10_000: 40}  # of WebP, up to so many pixels a side: the file stays below 5 MB


class Samples(NamedTuple):
    test: Images
    train: Images  # some of those on which networks are trained
    quality: str  # lossless, or of WebP

    @property
    def about(self) -> str:
        return f"{len(self.test)} test and {len(self.train)} training images (WebP, {self.quality})"


def _file(exp: Experiment) -> Path:
    """Where the explore stage writes them, beside its notebook."""
    return exp.out / "images.zip" if exp.results == "results" else exp.path("explore/images.zip")


def write(exp: Experiment) -> None:
    """Write images chosen at random by a fixed seed, as pictures; large ones are lossy."""
    pictures = {}
    for kind, images, count in (("test", exp.data.test, TEST), ("train", exp.data.fit, TRAIN)):
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]
        sample = images[chosen].load()
        in_colour = sample.pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()  # WebP has no grey
        for i, (pixels, label) in enumerate(zip(in_colour, sample.labels.tolist(), strict=True)):
            pictures[f"{kind}/{i:03}-{label}.webp"] = Image.fromarray(pixels)
    quality = next(quality for side, quality in QUALITY.items() if max(exp.data.test.shape) <= side)
    options = {"lossless": True} if quality == "lossless" else {"quality": quality}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.comment = (quality if quality == "lossless" else f"quality {quality}").encode()
        for name, picture in pictures.items():
            picture.save(content := io.BytesIO(), "WEBP", **options)
            archive.writestr(zipfile.ZipInfo(name), content.getvalue())  # its date is the same always
    with atomic(_file(exp)) as path:
        path.write_bytes(file.getvalue())


def read(exp: Experiment) -> Samples:
    """What `write` wrote.

    Raises:
        UserError: there is no such file, or it can't be read.
    """
    path, settings, pictures = _file(exp), exp.settings.data, {"test": ([], []), "train": ([], [])}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                picture = Image.open(archive.open(name)).convert("RGB")
                pixels, labels = pictures[name.partition("/")[0]]
                pixels.append(torch.from_numpy(np.atleast_3d(picture).copy()).permute(2, 0, 1))
                labels.append(int(Path(name).stem.partition("-")[2]))
            quality = archive.comment.decode()
        samples = [[torch.stack(pixels), torch.tensor(labels)] for pixels, labels in pictures.values()]
    except FileNotFoundError:
        raise UserError(f"images {path} do not exist; run the explore stage (dvc repro)") from None
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile) as error:
        raise UserError(f"images {path} can't be read ({error}); run the explore stage (dvc repro)") from None
    return Samples(*(Images(*sample, normalization=settings.normalization) for sample in samples), quality)
