"""Races: the same search as without, on fewer images."""

import numpy as np
import pytest
import torch

from legr.errors import UserError
from legr.fitness import FitnessSettings
from legr.racing import FIRST, Race
from legr.search import Evolution, SearchSettings, learn_ranking

IMAGES = 3000


def raced(losses, error=0.01, comparisons=100, classes=1):
    """A race over the columns of `losses` [candidates, images]: the winner, and how many images each has seen."""

    def see(numbers, upto):
        for number in numbers:
            race.tell(number, losses[number, race.seen(number) : upto])

    race = Race(np.arange(losses.shape[1]) % classes, error, comparisons, see)
    for number in range(len(losses)):
        race.tell(number, losses[number, :FIRST])
    return race.lowest(range(len(losses))), [race.seen(number) for number in range(len(losses))]


def like_networks(generator, offsets, images=IMAGES):
    """Losses whose means differ by `offsets`: images are hard or easy for all, skewed, with noise for each."""
    shared = generator.gamma(0.5, 2, images)
    return np.stack([offset + shared * generator.gamma(4, 0.25, images) for offset in offsets])


def test_the_winner_is_the_one_with_the_lowest_loss_and_the_clearly_worse_saw_little():
    generator = np.random.default_rng(0)
    right = 0
    for _ in range(200):
        losses = like_networks(generator, generator.uniform(0, 0.5, 6))
        winner, _ = raced(losses, error=0.05, comparisons=5)
        right += winner == losses.mean(1).argmin()
    assert right >= 190
    losses = like_networks(generator, [0, 0.02, 1, 2])
    winner, seen = raced(losses)
    assert winner == losses.mean(1).argmin()
    assert seen[3] == FIRST
    assert seen[0] > seen[2]


def test_two_that_nothing_tells_apart_are_seen_whole_and_equals_go_to_the_first():
    losses = like_networks(np.random.default_rng(1), [0, 0])
    winner, seen = raced(losses)
    assert winner == losses.mean(1).argmin()
    assert seen == [IMAGES, IMAGES]
    assert raced(np.repeat(losses[:1], 3, 0))[0] == 0


def test_what_classes_explain_needs_no_images():
    """Two networks, each better on half of the classes: between images of a class they differ by little."""
    generator, classes = np.random.default_rng(5), np.arange(IMAGES) % 10
    right, seen, blind = 0, [], []
    for _ in range(100):
        losses = 0.1 * like_networks(generator, [0, 0.5])
        losses += np.where(np.add.outer([0, 1], classes) % 2, 0.0, 1.0) * generator.gamma(20, 0.05, (2, IMAGES))
        winner, images = raced(losses, classes=10)
        right += winner == losses.mean(1).argmin()
        seen.append(min(images))
        blind.append(min(raced(losses)[1]))
    assert right >= 97
    assert np.mean(seen) < 0.8 * np.mean(blind)


def test_more_classes_than_images_are_no_strata():
    losses = like_networks(np.random.default_rng(6), [0, 0.02, 1, 2])
    winner, seen = raced(losses, classes=1000)
    assert winner == losses.mean(1).argmin()
    assert seen[3] < IMAGES


def test_small_sets_are_seen_whole():
    losses = like_networks(np.random.default_rng(2), [0, 5], images=100)
    assert raced(losses) == (0, [100, 100])


def test_a_network_that_is_broken_never_wins():
    losses = like_networks(np.random.default_rng(3), [0, 0, 0])
    losses[1, 5], losses[0, 900] = np.nan, np.inf
    assert raced(losses)[0] == 2


def test_a_raced_evolution_is_the_plain_one_on_fewer_images():
    """Losses as of networks, over whole evolutions: the same candidates, the same best one."""
    generator = np.random.default_rng(0)
    shared, norms = generator.gamma(0.5, 2, IMAGES), [torch.rand(8) * (i + 1) for i in range(30)]

    def losses(ranking):
        own = np.random.default_rng(abs(hash(ranking)) % 2**32)
        distance = np.abs(np.log(ranking.scale) - 0.5).mean()
        return (distance + shared * own.gamma(20, 0.05, IMAGES)).astype(np.float32)

    settings = SearchSettings(population=24, evaluations=120, sample=6)
    plain = Evolution(norms, settings)
    while not plain.done:
        candidate = plain.ask()
        plain.tell(candidate, float(losses(candidate).mean(dtype=np.float64)), 0.0)

    def see(numbers, upto):
        for number in numbers:
            race.tell(number, losses(evolution.candidates[number])[race.seen(number) : upto])

    race = Race(np.zeros(IMAGES), 0.05, 120 * 6, see)
    evolution = Evolution(norms, settings, lowest=race.lowest)
    while not evolution.done:
        candidate = evolution.ask()
        number = len(evolution.history)
        race.tell(number, losses(candidate)[:FIRST])
        evolution.tell(candidate, 0.0, 0.0)
    assert evolution.candidates == plain.candidates
    assert evolution.candidates[race.lowest(range(120))] == plain.best
    seen = [race.seen(number) for number in range(120)]
    assert np.mean(seen) < 0.8 * IMAGES


@pytest.mark.parametrize("kind", ["loss", "recalibrated"])
def test_racing_finds_what_the_plain_search_finds(small, digits, compute, kind):
    model, graph = small
    settings = SearchSettings(population=8, evaluations=30, sample=4)
    fitness = FitnessSettings(kind=kind, recalibration_images=64)
    plain = learn_ranking(model, graph, digits, 0.6, settings, fitness, compute)
    assert (plain.history.images == len(digits.holdout)).all()
    result = learn_ranking(model, graph, digits, 0.6, settings.model_copy(update={"racing": 0.1}), fitness, compute)
    assert result.candidates == plain.candidates
    assert result.ranking == plain.ranking
    np.testing.assert_allclose(result.history.best.iloc[-1], plain.history.best.iloc[-1], rtol=1e-6)
    whole = result.history.images == len(digits.holdout)
    for column in ("loss", "accuracy"):
        np.testing.assert_allclose(result.history[whole][column], plain.history[whole][column], rtol=1e-6)
    assert result.history.images.min() >= FIRST
    assert not whole.all()
    assert result.history.best.iloc[-1] == result.history.loss[result.candidates.index(result.ranking)]


def test_racing_is_for_one_flop_count(small, digits, compute):
    model, graph = small
    settings = SearchSettings(population=2, evaluations=4, sample=1, racing=0.1)
    fitness = FitnessSettings(kind="recalibrated", also_at=(0.8,))
    with pytest.raises(UserError, match="racing is 0.1; it must be 0 where also_at has further FLOP counts"):
        learn_ranking(model, graph, digits, 0.6, settings, fitness, compute)
