"""Data on the device, the recipes, resuming, recalibration."""

import io
import os
import pickle
import tarfile

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image

import legr
from experiments import datasets
from experiments.datasets import DataSettings, prepare
from legr import data
from legr.latency import measure
from legr.models import CifarResNet
from legr.state import tensors_digest
from legr.training import Compute, Recipe, evaluate, recalibrate, train


def fresh():
    torch.manual_seed(0)
    return CifarResNet(1)


RECIPE = Recipe(epochs=3, batch_size=64, lr=0.05, schedule="onecycle", resolutions=((0.4, 16),), flip=False)


def test_a_resumed_training_ends_the_same(digits, compute, tmp_path):
    class Killed(Exception):
        pass

    def stop(row):
        if row["epoch"] == 2:
            raise Killed

    part, whole = digits.fit.first(256), fresh()
    with pytest.raises(Killed):
        train(fresh(), part, RECIPE, compute, seed=0, state_folder=tmp_path, log=stop)
    resumed, seen = fresh(), []
    history = train(resumed, part, RECIPE, compute, seed=0, state_folder=tmp_path, log=seen.append)
    assert [row["epoch"] for row in seen] == [3]
    expected = train(whole, part, RECIPE, compute, seed=0)
    pd.testing.assert_frame_equal(history.drop(columns="seconds"), expected.drop(columns="seconds"))
    for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_training_learns(digits, compute):
    model = fresh()
    recipe = Recipe(epochs=4, batch_size=32, lr=0.05, schedule="onecycle", flip=False)
    history = train(model, digits.fit, recipe, compute, seed=0, validation=digits.holdout)
    assert evaluate(model, digits.test, compute)["accuracy"] > 0.8
    assert history.val_accuracy.iloc[-1] > 0.8


def test_a_corrupt_checkpoint_is_one_sentence(digits, compute, tmp_path):
    recipe = Recipe(epochs=1, batch_size=64, lr=0.01)
    train(fresh(), digits.fit.first(64), recipe, compute, seed=0, state_folder=tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(legr.UserError, match="checkpoint .* is corrupt"):
        train(fresh(), digits.fit.first(64), recipe, compute, seed=0, state_folder=tmp_path)


def test_a_learning_rate_that_diverges_is_one_sentence(digits, compute):
    with pytest.raises(legr.UserError, match="lr is 1e"):
        train(fresh(), digits.fit, Recipe(epochs=2, batch_size=16, lr=1e30), compute, seed=0)


def test_the_papers_schedules():
    baseline = Recipe(epochs=200, lr=0.1, milestones=(0.3, 0.6, 0.8), gamma=0.2)
    at = [baseline.learning_rate(e / 200) for e in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert at == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])
    cycle = Recipe(epochs=10, lr=0.2, schedule="onecycle", warmup=0.2)
    assert [cycle.learning_rate(x) for x in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.1, 0.2, 0.1, 0.0], abs=1e-7)


def test_crops_and_flips_are_shifted_copies_over_zero_padding():
    pixels = torch.randint(1, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = data.Images(pixels, torch.arange(20))
    ((batch, labels),) = data.augmented_batches(images, 20, torch.Generator().manual_seed(1))  # an eighth of 16: 2
    assert sorted(labels.tolist()) == list(range(20))
    seen = set()
    for crop, label in zip(batch, labels, strict=True):
        padded = torch.nn.functional.pad(pixels[label], (2, 2, 2, 2))
        options = {
            (y, x, flip): padded[:, y : y + 16, x : x + 16].flip(2) if flip else padded[:, y : y + 16, x : x + 16]
            for y in range(5)
            for x in range(5)
            for flip in (False, True)
        }
        matches = [k for k, v in options.items() if torch.allclose(data.normalize(v[None])[0], crop)]
        assert len(matches) == 1
        seen.add(matches[0])
    assert len({s[:2] for s in seen}) > 5
    assert {s[2] for s in seen} == {False, True}


def test_epochs_differ_and_seeds_repeat(digits):
    def labels(seed):
        return torch.cat([y for _, y in data.augmented_batches(digits.fit, 64, torch.Generator().manual_seed(seed))])

    assert torch.equal(labels(0), labels(0))
    assert not torch.equal(labels(0), labels(1))


def test_holdout_is_stratified_and_disjoint(digits):
    labels = torch.arange(1000) % 10
    fit, held = data.split_holdout(labels, 200, 0)
    assert sorted([*fit.tolist(), *held.tolist()]) == list(range(1000))
    assert torch.bincount(labels[held]).tolist() == [20] * 10
    assert len(digits.train) == len(digits.fit) + len(digits.holdout) == 1437
    with pytest.raises(legr.UserError, match="holdout is 1000"):
        data.split_holdout(labels, 1000, 0)


def test_recalibration_is_the_average_over_the_images(digits, compute):
    model = fresh()
    recalibrate(model, digits.fit.first(100), compute, batch_size=50)
    halves = [model.conv1(data.normalize(digits.fit.pixels[s])).mean((0, 2, 3)) for s in (slice(0, 50), slice(50, 100))]
    torch.testing.assert_close(model.bn1.running_mean, sum(halves) / 2, rtol=1e-4, atol=1e-5)


def test_recalibrated_statistics_are_pytorchs_own_average(digits, compute):
    model, plain = fresh().eval(), fresh()
    recalibrate(model, digits.fit.first(130), compute, batch_size=50)
    for norm in (m for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None
    plain.train()
    with torch.inference_mode():
        for part in digits.fit.first(130).pixels.split(50):
            plain(data.normalize(part))
    assert not model.training
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-4)
    assert model.state_dict().keys() == fresh().state_dict().keys() and model(data.normalize(part)).isfinite().all()


def test_recalibration_does_not_depend_on_the_number_of_threads(digits, compute):
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            recalibrate(model := fresh(), digits.fit.first(130), compute, batch_size=20)
            found.append(model.state_dict())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_bfloat16_agrees_with_float32(digits, compute):
    model = fresh()
    train(model, digits.fit, Recipe(epochs=1, batch_size=64, lr=0.05, flip=False), compute, seed=0)
    half = evaluate(model, digits.test, Compute(device="cpu", precision="bfloat16"))
    full = evaluate(model, digits.test, compute)
    assert half["loss"] == pytest.approx(full["loss"], rel=0.03)


def test_an_unknown_device_is_one_sentence():
    with pytest.raises(legr.UserError, match="device is 'abacus'"):
        Compute(device="abacus").resolve()


def write_tree(root, classes=("a", "b"), count=3, splits=("train", "test")):
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(np.full((32, 32, 3), 20 * number + i, np.uint8)).save(root / split / name / f"{i}.png")


def cifar(folder):
    return DataSettings(name="cifar10", holdout=1, folder=str(folder))


def test_a_folder_is_read_whatever_its_size(tmp_path, monkeypatch):
    write_tree(tmp_path / "in", datasets.CIFAR10_CLASSES, 2, ("train", "val"))
    classes, images, test = datasets._folder(tmp_path / "in", 16, False)
    assert classes == datasets.CIFAR10_CLASSES
    assert images.pixels.shape == (20, 3, 16, 16)
    assert len(test) == 20
    assert images.pixels[2, 0, 0, 0] == 20


def batch(names, labels, pixels):
    """One file of CIFAR-10's Python archive."""
    rows = pixels.transpose(0, 3, 1, 2).reshape(len(pixels), -1)
    return pickle.dumps({"filenames": names, "labels": labels, "data": rows}, protocol=2)


def archive(path, batches):
    with tarfile.open(path, "w:gz") as file:
        for name, content in batches.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def test_a_download_gives_the_same_data_as_a_folder(tmp_path):
    """Of the same images, whatever order the download's files have them in."""
    names, targets = ["b_2.png", "a_1.png", "c_7.png", "a_0.png", "d_0.png", "e_0.png"], [1, 0, 1, 0, 1, 0]
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), np.uint8)
    for name, target, image in zip(names[:5], targets, pixels, strict=False):
        (tmp_path / "in" / str(target)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "in" / str(target) / name.replace("png", "webp"), lossless=True)
    listing = torchvision.datasets.ImageFolder(tmp_path / "in")
    folder = datasets._decoded(listing.samples, 32, tmp_path)
    files = {f"data_batch_{i + 1}": batch(names[i : i + 1], targets[i : i + 1], pixels[i : i + 1]) for i in range(5)}
    path = archive(tmp_path / "a.tar.gz", files | {"test_batch": batch(names[5:], targets[5:], pixels[5:])})
    download, test = datasets.cifar10_archive(path)
    assert torch.equal(download.pixels, folder.pixels)
    assert torch.equal(download.labels, folder.labels)
    assert torch.equal(test.pixels[0].permute(1, 2, 0), torch.from_numpy(pixels[5]))


def test_code_in_an_image_archive_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = archive(tmp_path / "a.tar.gz", {"data_batch_1": pickle.dumps(Evil())})
    with pytest.raises(pickle.UnpicklingError, match="system is not a part of an image archive"):
        datasets.cifar10_archive(path)
    assert not (tmp_path / "ran").exists()


def test_digits_come_in_any_size_and_cifar10_in_its_own(tmp_path, monkeypatch):
    prepare(DataSettings(name="digits", holdout=10, resolution=16), tmp_path, tmp_path / "out")
    assert data.load(tmp_path / "out").test.side == 16
    monkeypatch.delenv("LEGR_CIFAR10", raising=False)
    with pytest.raises(legr.UserError, match=r"data\.resolution is 24; cifar10 has images of 32 by 32"):
        prepare(DataSettings(name="cifar10", holdout=10, resolution=24), tmp_path, tmp_path / "no")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: None, r"data folder .*in does not exist"),
        (lambda root: write_tree(root, splits=("train",)), r"data folder .*test does not exist"),
        (lambda root: write_tree(root), "has classes a, b; CIFAR-10 has airplane"),
        (lambda root: (write_tree(root), (root / "train" / "c").mkdir()), "not usable"),
        (
            lambda root: (write_tree(root), (root / "train" / "a" / "0.png").write_bytes(b"\x89PNG")),
            "1 unreadable images",
        ),
        (lambda root: (write_tree(root), write_tree(root, ("c",), splits=("train",))), "only one of its splits: c"),
    ],
)
def test_a_bad_data_folder_is_one_sentence(tmp_path, spoil, message):
    spoil(tmp_path / "in")
    with pytest.raises(legr.UserError, match=message):
        prepare(cifar(tmp_path / "in"), tmp_path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_truncated_cifar_is_not_taken_for_whole(tmp_path):
    from experiments.datasets import CIFAR10_CLASSES

    write_tree(tmp_path / "in", CIFAR10_CLASSES, 2)
    with pytest.raises(legr.UserError, match="20 training and 20 test images; CIFAR-10 has 50,000 and 10,000"):
        prepare(cifar(tmp_path / "in"), tmp_path, tmp_path / "out.safetensors")


def test_bad_data_files_are_one_sentence(tmp_path):
    with pytest.raises(legr.UserError, match="run the data stage"):
        data.load(tmp_path / "none.safetensors")
    (tmp_path / "half.safetensors").write_bytes(b"\x10")
    with pytest.raises(legr.UserError, match="is not whole"):
        data.load(tmp_path / "half.safetensors")


def test_weights_of_another_network_are_one_sentence(tmp_path):
    from safetensors.torch import save_file

    save_file(fresh().state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(legr.UserError, match=r"belongs to another network: tensor '.*' is \[.*\] there and must be \["):
        legr.models.load_weights(legr.models.resnet56(), tmp_path / "w.safetensors")
    with pytest.raises(legr.UserError, match="model is 'resnet57'"):
        legr.models.build("resnet57", 10, 0)


def test_latency_has_a_row_per_network_and_batch(compute):
    table = measure({"a": fresh(), "b": fresh()}, 32, (1, 4), compute, repetitions=3, warmup=1)
    assert list(zip(table.network, table.batch, strict=True)) == [("a", 1), ("b", 1), ("a", 4), ("b", 4)]
    assert (table.latency_ms > 0).all()


def test_another_number_of_threads_evaluates_the_same_and_trains_alike(digits, compute):
    """What the README states: the same loss of the same weights, and within 1% the same epoch's training loss."""
    before, losses, epochs = torch.get_num_threads(), [], []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            model = CifarResNet(1)
            losses.append(evaluate(model, digits.test, compute)["loss"])
            recipe = Recipe(epochs=1, batch_size=32, lr=0.01, flip=False)
            epochs.append(train(model, digits.fit, recipe, compute, seed=0).train_loss[0])
    finally:
        torch.set_num_threads(before)
    assert losses[1] == losses[0]
    assert epochs[1] == pytest.approx(epochs[0], rel=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_differs_by_rounding_only(digits, compute):
    torch.manual_seed(0)
    model = CifarResNet(1)
    here = evaluate(model, digits.test, compute)["loss"]
    gpu = Compute(device="cuda", precision="float32").resolve()
    there = evaluate(model.to("cuda"), digits.test.to("cuda"), gpu)["loss"]
    assert there == pytest.approx(here, rel=1e-3)


def test_the_same_seed_gives_the_same_bits(digits, compute):
    digests = []
    for _ in range(2):
        torch.manual_seed(0)
        model = CifarResNet(1)
        train(model, digits.fit, Recipe(epochs=1, batch_size=32, lr=0.05), compute, seed=3)
        digests.append(tensors_digest(model.state_dict()))
    assert digests[0] == digests[1]


def test_classes_take_turns():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = data.in_turn(labels)
    assert sorted(order.tolist()) == list(range(100))
    for n in (10, 25, 50):
        counts = labels[order][:n].bincount(minlength=3)
        assert (counts - n * torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 1
