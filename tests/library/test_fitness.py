"""How a ranking is judged: what is cut, what is done to it before its loss is measured, and on which images."""

import copy
import math

import pytest
import torch
from torch import nn

import legr
from legr.data import Dataset, Images, Normalization, hold_out
from legr.fitness import Fitness, FitnessSettings, for_evaluation
from legr.latency import measure
from legr.search import SearchSettings
from legr.training import Compute, Recipe, evaluate, train
from tests.conftest import NETWORKS, random_kept, settle

RANKING = legr.Ranking.norm_only(7)


@pytest.fixture
def judge(small, digits, compute):
    def made(targets=(0.6,), **settings):
        return Fitness(*small, digits, list(targets), FitnessSettings(**settings), compute)

    return made


def test_rankings_are_judged_by_the_networks_that_they_cut(small, judge, digits, compute):
    """By default, the paper's for CIFAR-10, nothing else is done to them."""
    model, graph = small
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scores, fitness = RANKING.scores(legr.filter_norms(model, graph)), judge((0.5, 0.8))
    for kept, target in zip(fitness.select(RANKING), (0.8, 0.5), strict=True):  # from the largest down
        assert all(torch.equal(a, b) for a, b in zip(kept, legr.select(graph, scores, target), strict=True))
        expected = evaluate(legr.prune(model, graph, kept), digits.holdout, compute)
        assert judge()([kept]) == pytest.approx(expected, rel=1e-4)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    nn.init.constant_(fitness.model.linear.bias, math.nan)
    assert fitness([kept])["loss"] == math.inf
    with pytest.raises(legr.UserError, match="target is 1.2; it must be a fraction"):
        judge((0.5, 1.2)).select(RANKING)


def test_images_to_validate_and_to_recalibrate_on_are_drawn_from_the_right_parts(judge, digits):
    def rows(images):
        return {pixels.numpy().tobytes() for pixels in images.pixels}

    fitness = judge(validation_images=50, recalibration_images=30)
    assert len(fitness.validation) == 50 and rows(fitness.validation) <= rows(digits.holdout)
    assert len(fitness.recalibration) == 30 and rows(fitness.recalibration) <= rows(digits.fit)
    assert rows(judge().validation) == rows(digits.holdout)


def test_recalibration_changes_statistics_and_steps_change_weights(judge):
    settings = {"plain": {}, "recalibrated": {"recalibration_images": 64}, "steps": {"steps": 2, "batch_size": 16}}
    networks = {name: (f := judge(**given)).network(f.select(RANKING)[0]) for name, given in settings.items()}
    weights = {name: dict(network.named_parameters()) for name, network in networks.items()}
    means = {name: network.get_buffer("bn1.running_mean") for name, network in networks.items()}
    assert all(torch.equal(weights["plain"][n], weights["recalibrated"][n]) for n in weights["plain"])
    assert not torch.equal(means["plain"], means["recalibrated"])
    assert not torch.equal(weights["plain"]["conv1.weight"], weights["steps"]["conv1.weight"])


def test_a_ranking_is_judged_at_several_targets(small, judge, digits, compute, monkeypatch):
    train(small[0], digits.fit, Recipe(epochs=1, batch_size=32, lr=0.05), compute, seed=0)
    small[0].linear.weight.data *= 4  # sure of what it says
    guess, settings = math.log(10), {"recalibration_images": 64, "validation_images": 64}

    def loss(*targets):
        fitness = judge(targets, **settings)
        return fitness(fitness.select(RANKING))

    large, medium, lowest = (loss(target) for target in (0.95, 0.9, 0.3))
    assert large["loss"] < guess and medium["loss"] < guess < lowest["loss"]
    assert loss(0.9, 0.95) == {"loss": (large["loss"] + medium["loss"]) / 2, "accuracy": large["accuracy"]}
    assert loss(0.2, 0.3, 0.95) == {"loss": (large["loss"] + 2 * guess) / 3, "accuracy": large["accuracy"]}

    lost = judge((0.95, 0.6, 0.3), **settings)
    nn.init.constant_(lost.model.linear.bias[:1], 50)  # it says 0 to everything
    tried, real = [], lost.network
    monkeypatch.setattr(lost, "network", lambda kept: tried.append(kept) or real(kept))
    assert lost(lost.select(RANKING))["loss"] == pytest.approx(guess)
    assert len(tried) == 1  # smaller networks of a ranking that is lost already are not tried


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_network_for_evaluation_says_what_the_plain_one_says(name, precision):
    torch.manual_seed(0)
    model, compute = settle(NETWORKS[name]()), Compute(device="cpu", precision=precision)
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
    small = legr.prune(model, graph, random_kept(graph, 0))
    fast = for_evaluation(copy.deepcopy(small), compute)
    x = torch.randn(16, 3, 32, 32)
    with torch.inference_mode():
        plain = small(x)
        with compute.autocast():
            half, found = small(x).float(), fast(x).float()
    if precision == "float32":
        assert (found - plain).abs().max() < 1e-5 * plain.abs().max()
    else:
        assert (found - plain).abs().mean() < 2 * (half - plain).abs().mean()
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) for network in (small, fast)]
    assert norms[1] == (norms[0] if name == "plain" else 0)  # there it follows a concatenation, not a convolution


class Grey(nn.Module):
    """Takes grey images that are wider than high."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 3, 2)
        self.linear = nn.Linear(12, 10)

    def forward(self, x):
        x = self.last(torch.relu(self.norm(self.first(x)))).relu()
        return self.linear(x.mean((2, 3)))


@pytest.fixture
def oblong():
    pixels = torch.randint(0, 256, (60, 1, 14, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = Images(pixels, torch.arange(60) % 10, normalization=Normalization.model_validate("raw"))
    return Dataset("oblong", list("0123456789"), images, hold_out(images.labels, 20, 0), images)


def test_grey_oblong_and_half_precision_networks_go_all_the_way(oblong, compute):
    for dtype in (torch.float32, torch.float16):
        torch.manual_seed(0)
        model = Grey().eval().to(dtype)
        graph = legr.trace(model, torch.zeros(1, *oblong.train.shape, dtype=dtype))
        search = SearchSettings(population=2, evaluations=4, sample=2)
        fitness = FitnessSettings(recalibration_images=16)
        result = legr.learn_ranking(model, graph, oblong, 0.6, search=search, fitness=fitness, compute=compute)
        scores = result.ranking.scores(legr.filter_norms(model, graph))
        small = legr.prune(model, graph, legr.select(graph, scores, 0.6))
        times = measure({"dense": model, "small": small}, graph.inputs, (1, 2), compute, 1)
        assert len(times) == 4 and (times.latency_ms > 0).all()


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        (Grey().half(), {"steps": 1}, "has weights of type torch.float16; it is trained in float32"),
        (Grey(), {"example": (1, 20, 14)}, r"data has images \[1, 14, 20\]; graph was traced with .* of \[1, 20, 14\]"),
    ],
    ids=["half precision", "another shape"],
)
def test_a_search_that_cannot_work_is_refused_before_anything_is_written(
    oblong, compute, tmp_path, model, settings, message
):
    example = settings.pop("example", oblong.train.shape)
    model = model.eval()
    graph = legr.trace(model, torch.zeros(1, *example, dtype=model.first.weight.dtype))
    options = {"fitness": FitnessSettings(**settings), "compute": compute, "state_folder": tmp_path / "state"}
    with pytest.raises(legr.UserError, match=message):
        legr.learn_ranking(model, graph, oblong, 0.6, **options)
    assert not (tmp_path / "state").exists()
