"""Random networks and random masks: what must hold for any of them (hypothesis)."""

import re

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.ops import StochasticDepth

import legr
from benchmarks.procedures import plain_select
from legr.models import BasicBlock
from legr.ranking import FLOOR
from tests.conftest import assert_same_gradients, random_kept, settle, silenced
from tests.library.test_graph import counted

EXAMPLES = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
SHAPES = st.sampled_from([(3, 12, 12), (1, 12, 9), (4, 7, 12), (3, 16, 5)])


class Joined(nn.Module):
    """What `how` makes of the outputs of several parts that read the same feature map."""

    def __init__(self, how, *parts: nn.Module):
        super().__init__()
        self.how, self.parts = how, nn.ModuleList(parts)

    def forward(self, x):
        return self.how(*[part(x) for part in self.parts])


class ByPixel(nn.Sequential):
    """Linear layers as 1×1 convolutions, as in ConvNeXt."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Own:
    """A forward pass of its own, which can be cut."""

    def forward(self, x):
        return torch.abs(super().forward(input=x))


class ByWidth:
    """A forward pass that reads how many channels there are."""

    def forward(self, x):
        return super().forward(x) / x[0].numel()


class ByFilter:
    """Weight standardization, in small."""

    def forward(self, x):
        return super().forward(x) * self.weight.std(correction=0)


LAYERS = {
    base: [type(f"{own.__name__}{base.__name__}", bases, {}) for own in (nn.Module, Own, ByWidth, ByFilter)
           for bases in [(base,) if own is nn.Module else (own, base)]]
    for base in (nn.Conv2d, nn.BatchNorm2d, nn.Linear)
}  # fmt: skip


def chain(*parts: nn.Module) -> nn.Module:
    """With a ReLU between every two."""
    return nn.Sequential(*[m for part in parts for m in (part, nn.ReLU())][:-1])


def conv(inputs: int, outputs: int, size: int = 3, stride: int = 1, groups: int = 1, bias: bool = True) -> nn.Module:
    return nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=bias)


def added(*parts: nn.Module) -> nn.Module:
    return Joined(torch.add, nn.Identity(), chain(*parts))


# Steps of a random network, from n channels; w and the stride s are drawn.
KINDS = {
    "plain": lambda n, w, s: conv(n, w, stride=s, bias=False),
    "residual": lambda n, w, s: added(conv(n, n, bias=False), nn.Identity()),
    "depthwise": lambda n, w, s: conv(n, n, stride=s, groups=n, bias=False),
    "inverted": lambda n, w, s: added(conv(n, w, 1, bias=False), nn.BatchNorm2d(w), conv(w, w, groups=w), conv(w, n)),
    "grouped": lambda n, w, s: chain(conv(n, 4, 1), conv(4, 4 * w, stride=s, groups=2)),  # stays whole
    "concat": lambda n, w, s: Joined(lambda *x: torch.cat(x, 1), conv(n, w, stride=s), conv(n, 3, 1, s)),
    "zeropad": lambda n, w, s: BasicBlock(n, n + w, s),
    "dropping": lambda n, w, s: added(conv(n, w), nn.BatchNorm2d(w), conv(w, n), StochasticDepth(0.5, "row")),
    "pool": lambda n, w, s: nn.MaxPool2d(3, 1, 1),
    "gate": lambda n, w, s: Joined(  # squeeze and excitation
        torch.mul, nn.Identity(), chain(nn.AdaptiveAvgPool2d(1), conv(n, w, 1), conv(w, n, 1), nn.Sigmoid())
    ),
    "linear": lambda n, w, s: added(ByPixel(nn.Linear(n, w), nn.ReLU(), nn.Linear(w, n))),
}
KIND, STRIDE = st.sampled_from(sorted(KINDS)), st.sampled_from([1, 2])
STEPS = st.lists(st.tuples(KIND, st.integers(2, 9), STRIDE), min_size=1, max_size=5)


@st.composite
def networks(draw, check=True):
    torch.manual_seed(draw(st.integers(0, 1000)))
    channels, flat, shape = draw(st.integers(2, 9)), draw(st.sampled_from([1, 2])), draw(SHAPES)
    parts = [nn.Dropout(0.2), conv(shape[0], channels)]
    for kind, width, stride in draw(STEPS):
        part = KINDS[kind](channels, width, stride)
        channels = part(torch.zeros(2, channels, *shape[1:])).shape[1]
        parts += [part, nn.BatchNorm2d(channels), nn.ReLU()]
    model = settle(nn.Sequential(*parts, nn.AdaptiveAvgPool2d(flat), nn.Flatten(), nn.Linear(channels * flat**2, 5)))
    for module in model.modules():
        if type(module) in LAYERS and draw(st.sampled_from([True, False, False])):
            module.__class__ = draw(st.sampled_from(LAYERS[type(module)]))
    try:
        return model, legr.trace(model, torch.zeros(1, *shape), check), shape
    except legr.UserError as error:
        assert "no layers that can be pruned" in str(error)
        assume(False)


@settings(max_examples=6, **EXAMPLES)
@given(networks(), st.integers(0, 1000), st.sampled_from([0.2, 0.5, 0.8]))
def test_pruned_equals_masked_in_both_modes_and_flops_equal_pytorchs(made, seed, share):
    model, graph, shape = made
    kept = random_kept(graph, seed, share)
    small = legr.prune(model, graph, kept)
    assert graph.flops() == counted(model, *shape)
    assert graph.flops(kept) == counted(small, *shape)
    assert graph.params() == sum(p.numel() for p in model.parameters())
    assert graph.params(kept) == sum(p.numel() for p in small.parameters())
    x, masked = torch.randn(2, *shape), silenced(model, graph, kept)
    for training in (False, True):
        outputs = []
        if not training:
            assert_same_gradients(small, masked, graph, kept, x)
        for network in (masked.train(training), small.train(training)):
            torch.manual_seed(0)
            with torch.no_grad():
                outputs.append(network(x))
        scale = outputs[0].abs().max().clamp(min=1)
        torch.testing.assert_close(outputs[1] / scale, outputs[0] / scale, rtol=1e-5, atol=1e-4 if training else 1e-5)
    stay = {o.module: graph.kept_channels(graph.kept_units(kept), o.outputs) for o in graph.operations}
    for name, found in small.named_buffers():
        expected = masked.get_buffer(name)
        expected = expected[stay[name.rpartition(".")[0]]] if expected.shape != found.shape else expected
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def random_scores(graph, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(width, generator=generator) for width in graph.widths]


@settings(max_examples=40, **EXAMPLES)
@given(networks(check=False), st.integers(0, 1000), st.sampled_from([FLOOR, 0.3]))
def test_selection_is_legr_pruning_and_smaller_networks_are_subsets(made, seed, floor):
    _, graph, _ = made
    scores, larger = random_scores(graph, seed), graph.masks(np.ones(graph.unit_count, bool))
    for fraction in (1.0, 0.9, 0.75, 0.6, 0.45, 0.3):
        try:
            kept = legr.select(graph, scores, fraction, floor=floor)
        except legr.UserError as error:
            lowest = float(re.search(r"network is ([0-9.]+)", str(error))[1])
            assert fraction <= lowest <= 1
            if lowest < 1:  # what the message promises holds, and no less is reached
                legr.select(graph, scores, lowest, floor=floor)
                with pytest.raises(legr.UserError):
                    legr.select(graph, scores, lowest - 0.0011, floor=floor)
            break
        assert all((small <= large).all() for small, large in zip(kept, larger, strict=True))
        expected = plain_select(graph, scores, fraction, floor) if fraction < 1 else larger
        assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
        larger = kept
