"""What tracing finds: layers, coupled units, FLOPs; and what it refuses."""

import operator

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import legr
from tests.conftest import settle, silenced


def counted(model: nn.Module, side: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2  # the counter's FLOPs are two a multiply-accumulate


@pytest.mark.parametrize(
    ("name", "classes", "side", "layers", "flops"),
    [("resnet56", 10, 32, 55, 125_485_696), ("mobilenet_v2", 1000, 224, 52, 300_774_272)],
)
def test_the_papers_networks(name, classes, side, layers, flops):
    model = settle(legr.models.build(name, classes, 0))
    graph = legr.trace(model, torch.zeros(1, 3, side, side))
    assert len(graph.layers) == layers
    assert graph.flops() == flops == counted(model, side)
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert [(layer.name, layer.width) for layer in graph.layers] == [(n, m.out_channels) for n, m in convolutions]
    kept = legr.select(graph, legr.filter_norms(model, graph), 0.4)
    small = legr.prune(model, graph, kept)
    assert graph.flops(kept) == counted(small, side)
    assert [small.get_submodule(layer.name).out_channels for layer in graph.layers] == [int(k.sum()) for k in kept]
    with torch.inference_mode():
        x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        expected = silenced(model, graph, kept)(x)
        assert (small(x) - expected).abs().max() < 1e-5 * expected.abs().max()


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 4, 3, padding=1), what

    def forward(self, x):
        return self.what(self.conv(x)).mean((2, 3))


class Then(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function, self.twice = function, nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.function(self, x)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda x: x[:, :2], "operation getitem in module .* can't be pruned"),
        (lambda x: torch.cumsum(x, 1), "cumsum"),
        (lambda x: x.transpose(1, 2), "transpose"),
        (lambda x: operator.truediv(x, 2.0), "truediv"),
        (nn.GroupNorm(2, 4), "GroupNorm in module what"),
        (nn.ConvTranspose2d(4, 4, 1), "ConvTranspose2d in module what"),
        (Then(lambda _, x: torch.flip(x, (1,))), "flip in module what"),
        (Then(lambda _, x: x if x.sum() > 0 else -x), "module what can't be traced .* control flow"),
        (Then(lambda own, x: own.twice(own.twice(x))), "Conv2d in module what.twice .* used twice"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(what, message):
    with pytest.raises(legr.UserError, match=message):
        legr.trace(Odd(what), torch.zeros(1, 3, 8, 8))
    with pytest.raises(legr.UserError, match=r"example_input of shape \[1, 1, 8, 8\] does not fit the network"):
        legr.trace(Odd(nn.Identity()), torch.zeros(1, 1, 8, 8))


def test_other_grouped_convolutions_stay_whole():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, groups=2), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(32, 2)
    )
    graph = legr.trace(model, torch.zeros(1, 3, 2, 2))
    assert [layer.name for layer in graph.layers] == ["2"]
    assert graph.flops() == counted(model, 2)


def test_masks_that_break_a_unit_are_an_error(small):
    _, graph = small
    kept = [torch.ones(w, dtype=torch.bool) for w in graph.widths]
    kept[0][3] = False
    with pytest.raises(legr.UserError, match="coupled filters"):
        graph.flops(kept)
    with pytest.raises(legr.UserError, match=r"has 1 layers; this network has 7"):
        graph.flops(kept[:1])
