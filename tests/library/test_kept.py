"""Layers whose output nothing activates before it is added or convolved: residual streams and linear bottlenecks."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import legr
from legr.fitness import Fitness, FitnessSettings
from legr.search import SearchSettings

BLOCKS = {
    "resnet50": [
        f"layer{stage}.{block}.{layer}"
        for stage, blocks in ((1, 3), (2, 4), (3, 6), (4, 3))
        for block in range(blocks)
        for layer in ("conv3", *(["downsample.0"] if block == 0 else []))
    ],
    "efficientnet_b0": [
        f"features.{stage}.{block}.block.{2 if stage == 1 else 3}.0"
        for stage, blocks in enumerate((1, 2, 2, 3, 3, 4, 1), 1)
        for block in range(blocks)
    ],
    "regnet_y_400mf": [
        f"trunk_output.block{stage}.block{stage}-{block}.{layer}"
        for stage, blocks in enumerate((1, 3, 6, 6), 1)
        for block in range(blocks)
        for layer in (*(["proj.0"] if block == 0 else []), "f.c.0")
    ],
    "mobilenet_v2": ["features.1.conv.1", *(f"features.{block}.conv.2" for block in range(2, 18))],
    "vgg11_bn": [],
    "densenet121": [],
}


@pytest.mark.parametrize("name", BLOCKS)
def test_the_block_outputs_of_torchvisions_networks(name):
    graph = legr.trace(torchvision.models.get_model(name).eval(), torch.zeros(1, 3, 64, 64), check=False)
    assert sorted(graph.unactivated) == sorted(set(BLOCKS[name]) & {layer.name for layer in graph.layers})
    assert bool(graph.unactivated) == bool(BLOCKS[name])


def test_the_streams_of_resnet56():
    graph = legr.trace(legr.models.resnet56(), torch.zeros(1, 3, 32, 32), check=False)
    assert list(graph.unactivated) == [f"blocks.{block}.conv2" for block in range(27)]


class Odd(nn.Module):
    """Depthwise and grouped convolutions and gates beside activations, of modules and of functions."""

    def __init__(self):
        super().__init__()
        self.activated, self.added, self.gated = (nn.Conv2d(8, 8, 1) for _ in range(3))
        self.gate, self.narrow, self.pooled = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.depthwise, self.last = nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.Conv2d(8, 8, 1)
        self.stem, self.linear = nn.Conv2d(3, 8, 1), nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.activated(x)
        x = F.relu(self.added(y * torch.sigmoid(y)) + x)
        y = self.gated(x)
        x = torch.add(x, y * torch.sigmoid(self.gate(x)))
        x = self.depthwise(self.narrow(F.relu(x)))
        x = F.max_pool2d(self.pooled(x), 2)
        return self.linear(F.relu(self.last(F.dropout(x, 0.1, self.training))).mean((2, 3)))


def test_what_activates_and_what_does_not():
    graph = legr.trace(Odd().eval(), torch.zeros(1, 3, 16, 16))
    assert list(graph.unactivated) == ["added", "narrow", "pooled"]


def test_kept_layers_stay_whole_in_selections_and_searches(digits, compute):
    torch.manual_seed(0)
    model = legr.models.CifarResNet(1).eval()
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
    norms, keep = legr.filter_norms(model, graph), graph.unactivated
    ranking = legr.Ranking(tuple(range(1, 8)), tuple(range(7)))
    ranked = legr.select(graph, ranking.scores(norms), 0.6, keep=keep)
    judge = Fitness(model, graph, digits, [0.7, 0.6], FitnessSettings(), compute, keep=keep)
    assert all(map(torch.equal, judge.select(ranking)[1], ranked))
    search = SearchSettings(population=8, evaluations=8, sample=2)
    options = {"search": search, "fitness": FitnessSettings(validation_images=64), "compute": compute}
    kept, free = (legr.learn_ranking(model, graph, digits, 0.6, keep=names, **options) for names in (keep, ()))
    assert kept.candidates == free.candidates and kept.history.loss.tolist() != free.history.loss.tolist()
