"""The data sets: digits, folders of images in memory and streamed, CIFAR-10's check, and the prepared file."""

import multiprocessing
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import legr
from experiments.data.datasets import CIFAR10_CLASSES, check_unchanged, load, prepare
from experiments.settings import DataSettings
from legr import models
from legr.data import Augmentation, ImageFiles, Images, _read_image
from legr.fitness import Fitness, FitnessSettings
from legr.training import Recipe, evaluate, train

WNIDS = ["n01440764", "n02102040", "n03888257"]


def plant(root, classes, counts=(10, 3)):
    """Photographs of several sizes and formats, train/<class>/ and val/<class>/."""
    random = np.random.default_rng(0)
    for split, count in zip(("train", "val"), counts, strict=True):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(40, 80, 2)
                pixels = random.integers(0, 120, (height, width, 3)) + np.eye(3, dtype=int)[label % 3] * 100
                image = Image.fromarray(pixels.astype(np.uint8))
                image = image.convert("L") if i == 0 else image  # some photographs have no colour
                image.save(root / split / name / f"{name}_{i}.{'png' if i % 2 else 'jpg'}")
    return root


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return plant(tmp_path_factory.mktemp("photos"), WNIDS)


def prepared(root, path, name="folder", **settings):
    given = DataSettings(**{"name": name, "holdout": 6, "resolution": 32, "folder": root and str(root)} | settings)
    prepare(given, path.parent, path)
    return load(path, given)


@pytest.fixture
def both(tree, tmp_path):
    """The same photographs in memory and streamed."""
    return prepared(tree, tmp_path / "memory"), prepared(tree, tmp_path / "disk", stream=True)


def test_digits_need_no_download_and_are_the_same_each_time(tmp_path):
    settings = DataSettings(name="digits", resolution=16, holdout=200, augmentation=Augmentation(flip=False))
    for name in ("a", "b"):
        prepare(settings, tmp_path, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    data = load(tmp_path / "a", settings)
    assert (len(data.fit), len(data.holdout), len(data.test), data.classes) == (998, 200, 599, list("0123456789"))
    assert data.train.pixels.shape == (1198, 3, 16, 16) and not data.train.augmentation.flip


@pytest.mark.parametrize("split", ["valid", "test"])
def test_a_folder_has_its_classes_in_order_and_images_keep_their_proportions(tmp_path, split):
    root = plant(tmp_path / "own", ["owl", "ant"])
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste("black", (30, 0, 60, 30))
    wide.save(root / "val/ant/ant_0.png")
    (root / "val").rename(root / split)
    data = prepared(root, tmp_path / "out", holdout=4, resolution=30)
    assert data.classes == ["ant", "owl"] and data.train.labels.bincount().tolist() == [10, 10]
    assert (len(data.fit), len(data.holdout), len(data.test)) == (16, 4, 7)
    brightest = data.train.pixels.float().mean((2, 3)).argmax(1)  # owls were planted red, ants green
    assert (brightest == 1 - data.train.labels).sum() >= 18
    assert (data.test.pixels[1] == 0).all()  # the square in the middle, not the whole squashed


@pytest.mark.parametrize("stream", [False, True])
def test_photographs_as_cameras_and_people_leave_them(tmp_path, stream):
    root = plant(tmp_path / "own", ["ant", "owl"], (4, 2))
    ramp = np.tile(np.linspace(0, 65535, 40).astype(np.uint16), (20, 1))  # dark on the left
    Image.fromarray(ramp).save(root / "train/ant/0.png")  # 16 bits
    turned = Image.fromarray((ramp / 257).astype(np.uint8)).rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(root / "train/ant/1.png", exif=exif)
    data = prepared(root, tmp_path / "out", resolution=(20, 40), normalization="none", stream=stream)
    inputs, _ = next(data.train.batches(3))
    for image, name in ((inputs[0, 0], "16 bits"), (inputs[1, 0], "turned")):
        np.testing.assert_allclose(image, np.tile(np.linspace(0, 1, 40), (20, 1)), atol=0.01, err_msg=name)
    batches = list(data.train.augmented_batches(4, torch.Generator().manual_seed(0)))
    assert all(inputs.shape == (4, 3, 20, 40) and 0 <= inputs.min() <= inputs.max() <= 1 for inputs, _ in batches)


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_read_and_left_out_is_one_table(tmp_path, stream, capsys):
    """Links that lead back, hidden and other files, images in no class, and test images that were trained on."""
    root = plant(tmp_path / "own", ["ant", "owl"], (4, 2))
    for split in ("train", "val"):
        shutil.copytree(root / split / "ant", root / split / ".ipynb_checkpoints")
    (root / "train/owl/notes.txt").touch()
    (root / "train/owl/a.GIF").touch()
    (root / "train/owl/._owl_0.jpg").touch()
    shutil.copy(root / "train/owl/owl_0.jpg", root / "train/loose.jpg")
    (tmp_path / "elsewhere").mkdir()
    shutil.move(root / "train/owl/owl_1.png", tmp_path / "elsewhere")
    for name, target in {"ant/up": "..", "ant/top": "../..", "ant/other": "../owl", "round": ".",
                         "owl/one": tmp_path / "elsewhere", "owl/two": tmp_path / "elsewhere"}.items():  # fmt: skip
        (root / "train" / name).symlink_to(target, target_is_directory=True)
    Image.open(root / "train/ant/ant_3.png").save(root / "val/owl/owl_1.png", compress_level=0)
    data = prepared(root, tmp_path / "out", holdout=3, stream=stream)
    twins, *table = capsys.readouterr().out.splitlines()
    assert twins.endswith("training images too, by the pixels read: 1 (val/owl/owl_1.png = train/ant/ant_3.png)")
    assert [line.rsplit(maxsplit=3) for line in table[1:]] == [
        ["ant", "4", "2", "2"],
        ["owl", "4", "1", "2"],
        ["all", "8", "3", "4"],
        ["left out: .gif", "1", "0", "0"],
        ["left out: .txt", "1", "0", "0"],
        ["left out: hidden", "2", "0", "1"],
        ["left out: image in no class", "1", "0", "0"],
        ["left out: link that leads back", "5", "0", "0"],
    ]
    assert data.classes == ["ant", "owl"] and data.train.labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "L", "RGB", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_transparent_pixels_lie_on_white(tmp_path, mode, channels):
    """The left half is black with alpha 0; palette and greys that are declared transparent too."""
    image = Image.new("RGBA", (32, 32), "gray" if mode != "1" else "white")
    image.paste((0, 0, 0, 0), (0, 0, 16, 32))
    path, declared = tmp_path / f"image.{'tiff' if mode == 'PA' else 'png'}", {}
    if mode in ("L", "RGB", "1", "P"):
        image = image.convert("RGB").quantize(2) if mode == "P" else image.convert("RGB").convert(mode)
        declared = {"transparency": image.getpixel((0, 0))}
    image.convert(mode).save(path, **declared)
    pixels = np.array(_read_image(path, channels))
    assert (pixels[:, :16] == 255).all() and (mode == "1" or (pixels[:, 16:] == 128).all())


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_pixels_without_a_known_range_are_refused(tmp_path, dtype):
    root = plant(tmp_path / "own", ["ant", "owl"], (2, 1))
    Image.fromarray(np.ones((40, 40), dtype)).save(root / "train/ant/ant_9.tiff")
    with pytest.raises(legr.UserError, match="^image .*ant_9.tiff can't be read .*its pixels have 32 bits"):
        prepared(root, tmp_path / "out", holdout=2)


def test_another_set_is_not_taken_for_cifar10(tmp_path, monkeypatch):
    monkeypatch.setenv("LEGR_CIFAR10", str(plant(tmp_path / "small", CIFAR10_CLASSES, (3, 1))))
    with pytest.raises(legr.UserError, match="small has 30 training and 10 test images of airplane"):
        prepared(None, tmp_path / "out", "cifar10")
    assert not (tmp_path / "out").exists()


def test_streaming_shows_what_memory_holds_and_epochs_repeat_by_their_seed(both):
    memory, disk = both
    assert isinstance(disk.fit, ImageFiles) and isinstance(memory.fit, Images)
    for part in ("fit", "holdout", "test"):
        for (x, y), (u, v) in zip(getattr(memory, part).batches(4), getattr(disk, part).batches(4), strict=True):
            assert torch.equal(x, u) and torch.equal(y, v)

    def epoch(seed, side=None):
        return torch.cat([x for x, _ in disk.fit.augmented_batches(7, torch.Generator().manual_seed(seed), side)])

    assert epoch(1).shape == (21, 3, 32, 32)  # of 24 images: an incomplete last batch is dropped
    assert torch.equal(epoch(1), epoch(1)) and not torch.equal(epoch(1), epoch(2))
    assert epoch(1, 24).shape == (21, 3, 24, 24)
    padded = F.pad(memory.fit.pixels, (4, 4, 4, 4))
    crops = torch.cat([padded[:, :, row : row + 32, column : column + 32] for row in range(9) for column in range(9)])
    crops = memory.fit.normalization(torch.cat([crops, crops.flip(3)]))
    assert {x.numpy().tobytes() for x in epoch(1)} <= {x.numpy().tobytes() for x in crops}


def test_a_streamed_set_trains_and_is_searched_as_in_memory(both, compute):
    results = []
    for images in both:
        model = models.build("mobilenet_v2", 3, 0).eval()
        graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
        judge = Fitness(model, graph, images, [0.5], FitnessSettings(recalibration_images=16), compute)
        networks = judge.select(legr.Ranking.norm_only(len(graph.layers)))
        results.append([evaluate(model, images.test, compute)["loss"], judge(networks)["loss"]])
        rows = train(model, images.fit, Recipe(epochs=1, batch_size=12, lr=0.01), compute, seed=0)
        assert np.isfinite(rows.train_loss).all()
    assert results[0] == results[1]


@pytest.mark.parametrize("stream", [False, True])
def test_an_image_that_breaks_off_is_named_and_leaves_no_process(tree, tmp_path, stream):
    """Processes that live on in the exception would complain whenever others end."""
    root, before = shutil.copytree(tree, tmp_path / "copy"), multiprocessing.active_children()
    images = prepared(root, tmp_path / "out", stream=stream)
    broken = root / "train" / WNIDS[0] / f"{WNIDS[0]}_3.png"
    broken.write_bytes(broken.read_bytes()[:600])  # its header is whole
    read = [lambda: prepared(root, tmp_path / "again", stream=stream)]
    for each in read + [lambda: list(images.train.batches(5))] * stream:
        with pytest.raises(legr.UserError, match=r"^image .*n01440764_3\.png can't be read") as error:
            each()
        assert "\n" not in str(error.value) and multiprocessing.active_children() == before


CHANGES = {  # of a folder's images, and whether they are other images then
    "removed": (lambda path: path.unlink(), True),
    "another image of the same name": (lambda path: Image.new("RGB", (50, 50)).save(path), True),
    "touched": (lambda path: os.utime(path, ns=(0, 0)), False),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("change", "others"), CHANGES.values(), ids=CHANGES)
def test_a_folder_that_has_changed_since_it_was_read_is_noticed(tree, tmp_path, stream, change, others):
    root, path = shutil.copytree(tree, tmp_path / "copy"), tmp_path / "laptop/photos.pt"
    settings = DataSettings(name="folder", holdout=6, resolution=32, folder=str(root), stream=stream)
    prepare(settings, tmp_path, path)
    before = load(path, settings).digest()
    check_unchanged(settings, path)
    change(root / "train" / WNIDS[1] / f"{WNIDS[1]}_4.jpg")
    with pytest.raises(legr.UserError, match=r"^images in .*copy are not .*: dvc repro -f -s data@laptop-photos$"):
        check_unchanged(settings, path)
    prepare(settings, tmp_path, path)
    check_unchanged(settings, path)
    assert (load(path, settings).digest() != before) == others


def test_another_folder_in_the_environment_is_noticed(tree, tmp_path, monkeypatch):
    """Where none is named any more, the images that were read are those that there are."""
    settings, path = DataSettings(name="imagenette", holdout=6), tmp_path / "images.pt"
    monkeypatch.setenv("LEGR_IMAGENETTE", str(tree))
    prepare(settings, tmp_path, path)
    check_unchanged(settings, path)
    monkeypatch.setenv("LEGR_IMAGENETTE", str(plant(tmp_path / "others", WNIDS, (9, 3))))
    with pytest.raises(legr.UserError, match=r"^images in .*others are not those in .*\(they were read from .*photos"):
        check_unchanged(settings, path)
    monkeypatch.delenv("LEGR_IMAGENETTE")
    check_unchanged(settings, path)


def test_a_file_of_images_that_can_not_be_used_is_refused(tree, tmp_path):
    path, settings = tmp_path / "out", DataSettings(name="folder", holdout=6, resolution=32, folder=str(tree))
    with pytest.raises(legr.UserError, match="out do not exist; run the data stage"):
        load(path, settings)
    prepare(settings, tmp_path, path)
    with pytest.raises(legr.UserError, match="were prepared with other settings; run the data stage"):
        load(path, settings.model_copy(update={"holdout": 7}))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(legr.UserError, match="file .*out is corrupt .*delete it"):
        load(path, settings)
