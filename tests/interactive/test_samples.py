"""The images that are committed: what they are, how large the file is, and what is said of one that can't be used."""

import zipfile
from types import SimpleNamespace

import pytest
import torch

from experiments.experiment import open_experiment
from experiments.interactive import samples
from legr.data import Dataset, Images, Normalization
from legr.files import UserError
from tests.conftest import NAME
from tests.pipeline.test_work import plant

NONE = Normalization.model_validate("none")


@pytest.fixture
def exp(tmp_path, any_code):
    """Of a pipeline's stage, which writes to its own folder."""
    return open_experiment("demo", NAME, "explore", "results", root=plant(tmp_path))


def test_images_come_back_as_they_were_chosen_by_a_fixed_seed(exp):
    samples.write(exp)
    file = exp.out / "images.zip"
    found, first = samples.read(exp), file.read_bytes()
    for images, every, count in ((found.test, exp.data.test, 500), (found.train, exp.data.fit, 256)):
        chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[:count]
        assert len(images) == count and images.normalization == every.normalization
        assert torch.equal(images.pixels, every.pixels[chosen]) and torch.equal(images.labels, every.labels[chosen])
    assert found.about == "500 test and 256 training images (WebP, lossless)"
    samples.write(exp)
    assert file.read_bytes() == first


@pytest.mark.parametrize("side", [128, 129])
def test_photographs_are_lossy_and_look_alike(tmp_path, side):
    smooth = torch.linspace(0, 255, side).to(torch.uint8).expand(60, 3, side, side)
    images = Images(smooth, torch.arange(60) % 10, normalization=NONE)
    data = Dataset("photographs", list("0123456789"), images[:35], torch.arange(15), images[:40])
    settings = SimpleNamespace(data=SimpleNamespace(normalization=NONE))
    exp = SimpleNamespace(results="results", out=tmp_path, data=data, settings=settings)
    samples.write(exp)
    found = samples.read(exp)
    assert (len(found.test), len(found.train)) == (40, 20) and found.test.shape == (3, side, side)
    assert found.quality == ("quality 95" if side == 128 else "quality 40")
    assert (found.test.pixels.float() - smooth[:40].float()).abs().max() < 12
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    assert torch.equal(found.train.labels, data.fit.labels[order])


def test_a_file_that_is_not_there_or_not_whole_is_one_sentence(exp):
    with pytest.raises(UserError, match=r"^images .*images\.zip do not exist; run the explore stage"):
        samples.read(exp)
    file = exp.out / "images.zip"
    file.write_bytes(b"PK")
    with pytest.raises(UserError, match=r"images\.zip can't be read \(.*\); run the explore stage"):
        samples.read(exp)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("test/000-3.webp", b"no picture")
    with pytest.raises(UserError, match=r"images\.zip can't be read"):
        samples.read(exp)
