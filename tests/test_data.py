"""Batches: order, crops, flips and what decides them; the parts of a data set."""

import itertools

import pytest
import torch
from torch.nn import functional as F

import legr
from legr.data import IMAGENET_MEAN, IMAGENET_STD, Augmentation, Dataset, Images, hold_out

MEAN, STD = (255 * torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))


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
    dataset, other = (Dataset("noise", ["a"], train, torch.tensor(h), noise(5, 8)) for h in (held, [3, 4, 21]))
    assert dataset.holdout.labels.tolist() == held
    assert dataset.fit.labels.tolist() == [i for i in range(30) if i not in held]
    assert torch.equal(dataset.fit.pixels[3], train.pixels[5])
    assert dataset.digest() != other.digest()
