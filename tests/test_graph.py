"""What tracing finds: layers, coupled units, FLOPs; and what it refuses."""

import operator

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import legr
from tests.conftest import Inverted, random_kept


def counted(model: nn.Module, side: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, 3, side, side))
    return counter.get_total_flops() // 2  # the counter's FLOPs are two a multiply-accumulate


@pytest.mark.parametrize(
    ("name", "classes", "side", "layers", "flops"),
    [("resnet56", 10, 32, 55, 125_485_696), ("mobilenet_v2", 1000, 224, 52, 300_774_272)],
)
def test_the_papers_networks(name, classes, side, layers, flops):
    model = legr.models.build(name, classes, 0).eval()
    graph = legr.trace(model, torch.zeros(1, 3, side, side))
    assert len(graph.layers) == layers
    assert graph.flops() == flops == counted(model, side)
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert [(layer.name, layer.width) for layer in graph.layers] == [(n, m.out_channels) for n, m in convolutions]
    kept = legr.select(graph, legr.filter_norms(model, graph), 0.4)
    assert graph.flops(kept) == counted(legr.prune(model, graph, kept), side)


def test_flops_agree_with_pytorchs_counter(network):
    graph = legr.trace(network, torch.zeros(1, 3, 32, 32))
    assert graph.flops() == counted(network, 32)
    for seed in range(5):
        kept = random_kept(graph, seed)
        assert graph.flops(kept) == counted(legr.prune(network, graph, kept), 32)


def test_residual_stream_is_one_unit_per_channel(small):
    _, graph = small
    units = dict(zip([layer.name for layer in graph.layers], graph.units, strict=True))
    assert (units["conv1"] == units["blocks.0.conv2"]).all()
    assert (units["conv1"] == units["blocks.1.conv2"][:16]).all()  # zeros are appended after the stream
    assert not set(units["blocks.0.conv1"]) & set(units["conv1"])


def test_an_add_couples_however_it_is_written():
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)
            self.linear = nn.Linear(8, 2)

        def forward(self, x):
            return self.linear(torch.add(self.left(x), other=self.right(x)).mean((2, 3)))

    graph = legr.trace(Adds(), torch.zeros(1, 3, 8, 8))
    assert (graph.units[0] == graph.units[1]).all()


def test_depthwise_convolution_is_coupled_with_the_expansion():
    graph = legr.trace(Inverted(), torch.zeros(1, 3, 32, 32))
    units = dict(zip([layer.name for layer in graph.layers], graph.units, strict=True))
    assert (units["expand.0"] == units["depthwise.0"]).all()
    assert (units["stem.0"] == units["project.0"]).all()


def test_tracing_leaves_the_network_alone(network):
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    legr.trace(network, torch.zeros(1, 3, 32, 32))
    assert network.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())


class Odd(nn.Module):
    def __init__(self, what):
        super().__init__()
        self.conv, self.what = nn.Conv2d(3, 4, 3, padding=1), what

    def forward(self, x):
        return self.what(self.conv(x)).mean((2, 3))


@pytest.mark.parametrize(
    ("what", "named"),
    [
        (lambda x: x[:, :2], "getitem"),
        (lambda x: torch.cumsum(x, 1), "cumsum"),
        (lambda x: x.transpose(1, 2), "transpose"),
        (lambda x: operator.truediv(x, 2.0), "truediv"),
        (nn.GroupNorm(2, 4), "GroupNorm in module what"),
        (nn.ConvTranspose2d(4, 4, 1), "ConvTranspose2d in module what"),
    ],
)
def test_what_cannot_be_pruned_is_refused_by_name(what, named):
    with pytest.raises(legr.UserError, match=named):
        legr.trace(Odd(what), torch.zeros(1, 3, 8, 8))


def test_a_function_is_refused_with_its_module():
    class Inner(nn.Module):
        def forward(self, x):
            return torch.flip(x, (1,))

    with pytest.raises(legr.UserError, match="flip in module what"):
        legr.trace(Odd(Inner()), torch.zeros(1, 3, 8, 8))


def test_control_flow_on_values_is_refused_with_its_module():
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(legr.UserError, match="module what can't be traced .* control flow"):
        legr.trace(Odd(Branch()), torch.zeros(1, 3, 8, 8))


def test_an_example_that_does_not_fit_is_one_sentence():
    with pytest.raises(legr.UserError, match=r"example_input of shape \[1, 1, 8, 8\] does not fit the network"):
        legr.trace(Odd(nn.Identity()), torch.zeros(1, 1, 8, 8))


def test_a_convolution_used_twice_is_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(self.conv(x)).mean((2, 3))

    with pytest.raises(legr.UserError, match="conv.*used twice"):
        legr.trace(Twice(), torch.zeros(1, 3, 8, 8))


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
