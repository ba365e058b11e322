"""What tracing finds: layers, coupled units, FLOPs. What it leaves whole or refuses is in test_tracing.py."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import legr
from tests.conftest import settle, silenced


def counted(model: nn.Module, *shape: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2  # the counter's FLOPs are two a multiply-accumulate


@pytest.mark.parametrize(
    ("name", "classes", "side", "layers", "flops"),
    [("resnet56", 10, 32, 55, 125_485_696), ("mobilenet_v2", 1000, 224, 52, 300_774_272)],
)
def test_the_papers_networks(name, classes, side, layers, flops):
    model = settle(legr.models.build(name, classes, 0))
    graph = legr.trace(model, torch.zeros(1, 3, side, side), check=False)  # which takes long at 224²
    assert len(graph.layers) == layers
    assert graph.flops() == flops == counted(model, 3, side, side)
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert [(layer.name, layer.width) for layer in graph.layers] == [(n, m.out_channels) for n, m in convolutions]
    kept = legr.select(graph, legr.filter_norms(model, graph), 0.4)
    small = legr.prune(model, graph, kept)
    assert graph.flops(kept) == counted(small, 3, side, side)
    assert [small.get_submodule(layer.name).out_channels for layer in graph.layers] == [int(k.sum()) for k in kept]
    with torch.inference_mode():
        x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        expected = silenced(model, graph, kept)(x)
        assert (small(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_example_of_the_modules_description():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3 = (nn.Conv2d(i, 2, 3, padding=1, bias=False) for i in (3, 2, 2))
            self.linear = nn.Linear(2, 5, bias=False)

        def forward(self, x):
            a = self.conv1(x)
            return self.linear(torch.add(a, other=self.conv3(self.conv2(a))).mean((2, 3)))

    model = Block()
    graph = legr.trace(model, torch.zeros(1, 3, 4, 4))
    assert graph.members == [{0: 1, 2: 1}, {0: 1, 2: 1}, {1: 1}, {1: 1}]
    kept = graph.masks(np.array([True, False, True, True]))  # n = 1, m = 2
    assert [mask.tolist() for mask in kept] == [[True, False], [True, True], [True, False]]
    assert graph.flops(kept) == 9 * 16 * (3 * 1 + 1 * 2 + 2 * 1) + 1 * 5
    assert graph.params(kept) == sum(p.numel() for p in legr.prune(model, graph, kept).parameters())


def test_masks_that_break_a_unit_are_an_error(small):
    _, graph = small
    kept = [torch.ones(w, dtype=torch.bool) for w in graph.widths]
    kept[0][3] = False
    with pytest.raises(legr.UserError, match="coupled filters"):
        graph.flops(kept)
    with pytest.raises(legr.UserError, match=r"has 1 layers; this network has 7"):
        graph.flops(kept[:1])
