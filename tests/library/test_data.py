"""Batches: order, crops, flips and what decides them; the parts of a data set."""

import itertools

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F

import legr
from legr.data import Augmentation, Dataset, Images, Normalization, hold_out

MEAN, STD = (255 * torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def noise(count, side, **augmentation):
    pixels = torch.randint(1, 256, (count, 3, side, side), dtype=torch.uint8, generator=seeded(0))
    return Images(pixels, torch.arange(count), Augmentation(**augmentation))


def test_plain_batches_are_all_images_in_order_normalized():
    images = noise(10, 8)
    inputs, labels = zip(*images.batches(4), strict=True)
    assert [len(part) for part in labels] == [4, 4, 2]
    assert torch.cat(labels).tolist() == list(range(10))
    torch.testing.assert_close(torch.cat(inputs) * STD + MEAN, images.pixels.float())


@pytest.mark.parametrize("flip", [False, True])
def test_crops_and_flips_are_shifted_copies_over_zero_padding(flip):
    images = noise(20, 16, flip=flip)
    ((batch, labels),) = images.augmented_batches(20, seeded(1))
    assert sorted(labels.tolist()) == list(range(20))
    seen = []
    for crop, label in zip((batch * STD + MEAN).round(), labels, strict=True):
        padded = F.pad(images.pixels[label], (2, 2, 2, 2))  # an eighth of 16
        for y, x, flipped in itertools.product(range(5), range(5), (False, True)):
            part = padded[:, y : y + 16, x : x + 16]
            if torch.equal(part.flip(2) if flipped else part, crop.to(torch.uint8)):
                seen.append((y, x, flipped))
    assert len(seen) == 20
    assert len({place[:2] for place in seen}) > 5
    assert {place[2] for place in seen} == {False, flip}


@pytest.mark.parametrize(("min_area", "flip"), [(0.08, True), (0.5, False)])
def test_resized_crops_are_parts_of_the_image_and_flips(min_area, flip):
    """Pixels tell where they come from: red grows by 4 a column, green by 4 a row, of 32."""
    ramp = (4 * torch.arange(32)).to(torch.uint8).expand(32, 32)
    pixels = torch.stack([ramp, ramp.T, torch.zeros_like(ramp)]).expand(400, 3, 32, 32)
    images = Images(pixels, torch.arange(400), Augmentation(crop="resized", min_area=min_area, flip=flip))
    ((batch, _),) = images.augmented_batches(400, seeded(0))
    places = (batch * STD + MEAN) / 4
    column, row = places[:, 0, 16], places[:, 1, :, 16]
    width, height = (16 * (x[:, 17] - x[:, 15]) for x in (column, row))
    assert 150 < (width < 0).sum() < 250 if flip else (width > 0).all()
    area = width.abs() * height / 32**2
    assert min_area - 1e-4 <= area.min() < min_area + 0.05
    assert 0.9 < area.max() <= 1.0001
    ratio = (width.abs() / height)[area < 0.7]  # the image cuts off others
    assert 0.74 < ratio.min() < 0.8 and 1.25 < ratio.max() < 1.34
    for x, size in ((column, width.abs()), (row, height)):
        first, last = (x[:, 15] + x[:, 16] - size) / 2, (x[:, 15] + x[:, 16] + size) / 2
        assert -0.51 < first.min() < 1 and 30 < last.max() < 31.51  # pixel 0 reaches from -0.5 to 0.5


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_grey_and_oblong_images_stay_so(crop):
    pixels = torch.randint(0, 256, (9, 1, 16, 24), dtype=torch.uint8, generator=seeded(0))
    images = Images(pixels, torch.arange(9), Augmentation(crop=crop), Normalization.model_validate("none"))
    ((inputs, _),) = images.batches(9)
    torch.testing.assert_close(inputs, pixels / 255)
    for side, shape in ((None, (16, 24)), (8, (8, 12))):
        ((inputs, labels),) = images.augmented_batches(9, seeded(1), side)
        assert inputs.shape == (9, 1, *shape) and sorted(labels.tolist()) == list(range(9))
        assert inputs.min() >= 0 and inputs.max() <= 1


@pytest.mark.parametrize(("name", "low", "high"), [("none", 0, 1), ("raw", 0, 255), ("imagenet", -2.118, 2.64)])
def test_a_normalization_has_a_name_or_numbers(name, low, high):
    named, pixels = Normalization.model_validate(name), torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1)
    found = named(pixels.expand(2, 3, 4, 4))
    assert (found.min().item(), found.max().item()) == pytest.approx((low, high), abs=1e-3)
    assert found.dtype == torch.float32 and found.is_contiguous(memory_format=torch.channels_last)
    assert Normalization.model_validate(named.model_dump()) == named
    for wrong in ("cifar", {"mean": [], "std": [1]}, {"std": [0]}, {"means": [0]}):
        with pytest.raises(
            ValidationError, match="it must be imagenet, none, raw|at least 1|greater than 0|not permit"
        ):
            Normalization.model_validate(wrong)


def test_what_is_no_set_of_images_is_refused():
    pixels, labels = noise(4, 8).pixels, torch.arange(4)
    for wrong, message in (
        ({"pixels": pixels / 255}, r"pixels is torch.float32 \[4, 3, 8, 8\]; it must be torch.uint8 \[N, C, H, W\]"),
        ({"pixels": pixels[0]}, r"pixels is torch.uint8 \[3, 8, 8\]"),
        ({"pixels": pixels[:3]}, r"pixels is torch.uint8 \[3, 3, 8, 8\]; .* with 4 labels"),
        ({"labels": labels.float()}, r"labels is torch.float32 \[4\]; it must be torch.int64 \[N\]"),
        ({"pixels": pixels[:0], "labels": labels[:0]}, "labels has no images; a set must have one or more"),
        ({"pixels": "pixels"}, "pixels is of type str; it must be a tensor or array of real numbers"),
        ({"labels": 3}, r"labels is torch.int64 \[\]; it must be torch.int64 \[N\]"),
        ({"pixels": pixels[:, :1]}, "normalization.mean has 3 numbers; the images have 1 channels"),
    ):
        with pytest.raises(legr.UserError, match=message):
            Images(**{"pixels": pixels, "labels": labels} | wrong)
    for test, message in (
        (noise(5, 8), "test has labels 0 to 4; there are 4 classes"),
        (noise(4, 9), r"test \[3, 9, 9\]"),
    ):
        with pytest.raises(legr.UserError, match=message):
            Dataset("noise", list("abcd"), noise(4, 8), torch.tensor([0]), test)
    for held in ([], range(4)):
        with pytest.raises(legr.UserError, match=f"holdout_index has {len(held)} images; it must have between 1 and 3"):
            Dataset("noise", list("abcd"), noise(4, 8), torch.tensor([*held]), noise(4, 8))


def test_images_may_be_numpys():
    images = noise(4, 8)
    assert Images(images.pixels.numpy()[::-1], images.labels.numpy()[::-1]).digest() == images[[3, 2, 1, 0]].digest()


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_the_generator_decides_everything(crop):
    images = noise(40, 16, crop=crop)

    def epoch(seed):
        inputs, labels = zip(*images.augmented_batches(8, seeded(seed)), strict=True)
        return torch.cat(inputs), torch.cat(labels)

    (x, y), (u, v), (_, w) = epoch(1), epoch(1), epoch(2)
    assert torch.equal(x, u) and torch.equal(y, v)
    assert not torch.equal(y, w)


def test_an_incomplete_last_batch_is_dropped_unless_it_is_the_only_one_and_images_may_be_shrunk():
    for count, side, shapes in ((10, None, [(4, 16), (4, 16)]), (8, 12, [(4, 12), (4, 12)]), (3, 16, [(3, 16)])):
        batches = noise(count, 16).augmented_batches(4, seeded(0), side)
        assert [tuple(inputs.shape) for inputs, _ in batches] == [(n, 3, s, s) for n, s in shapes]


def test_of_every_class_its_share_is_held_out():
    labels = torch.tensor([0] * 600 + [1] * 300 + [2] * 100)[torch.randperm(1000, generator=seeded(0))]
    held = hold_out(labels, 200, 0)
    assert held.tolist() == sorted(set(held.tolist()))
    for count in (10, 25, 200, 333):
        counts = labels[hold_out(labels, count, 0)].bincount(minlength=3)
        assert counts.sum() == count
        assert (counts - count * torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 1
    assert torch.equal(held, hold_out(labels, 200, 0))
    assert not torch.equal(held, hold_out(labels, 200, 1))
    for count in (-1, 0, 1000):
        with pytest.raises(legr.UserError, match=f"holdout is {count}; it must be between 1 and 999"):
            hold_out(labels, count, 0)


def test_fit_and_holdout_are_all_training_images_each_once():
    train, held = noise(30, 8), [3, 4, 20]
    dataset, other = (
        Dataset("noise", [*"abcdefghijklmnopqrstuvwxyzäöüß"], train, torch.tensor(h), noise(5, 8))
        for h in (held, [3, 4, 21])
    )
    assert dataset.holdout.labels.tolist() == held
    assert dataset.fit.labels.tolist() == [i for i in range(30) if i not in held]
    assert torch.equal(dataset.fit.pixels[3], train.pixels[5])
    assert dataset.digest() != other.digest()
