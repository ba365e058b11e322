"""Random networks and random masks: what must hold for any of them (hypothesis)."""

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import legr
from benchmarks.networks import silenced
from legr.models import ZeroPadShortcut
from legr.ranking import MAX_PRUNED, MIN_WIDTH
from tests.conftest import random_kept, settle
from tests.test_graph import counted

KINDS = ("plain", "residual", "depthwise", "inverted", "grouped", "concat", "zeropad", "pool", "gate")
SIDE = 12


class Block(nn.Module):
    """One step of a random network: [N, inputs, H, W] to [N, outputs, H', W']."""

    def __init__(self, kind: str, inputs: int, width: int, stride: int):
        super().__init__()
        self.kind, self.stride, self.outputs = kind, stride, width
        if kind in ("residual", "inverted"):
            self.outputs, self.stride = inputs, 1
        elif kind in ("depthwise", "pool", "gate"):
            self.outputs = inputs
        elif kind == "zeropad":
            self.outputs = inputs + width
        if kind == "concat":
            self.left, self.right = nn.Conv2d(inputs, width, 3, stride, 1), nn.Conv2d(inputs, 3, 1, stride)
            self.outputs = width + 3
        elif kind == "grouped":  # stays whole
            self.before, self.conv = nn.Conv2d(inputs, 4, 1), nn.Conv2d(4, 4 * width, 3, stride, 1, groups=2)
            self.outputs = 4 * width
        elif kind == "depthwise":
            self.conv = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
        elif kind == "inverted":
            self.expand, self.project = nn.Conv2d(inputs, width, 1, bias=False), nn.Conv2d(width, inputs, 1)
            self.middle, self.conv = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False)
        elif kind == "zeropad":
            self.first, self.conv = nn.Conv2d(inputs, width, 3, stride, 1), nn.Conv2d(width, self.outputs, 3, 1, 1)
            self.shortcut = ZeroPadShortcut(width, stride)
        elif kind == "gate":  # squeeze and excitation
            self.squeeze, self.excite = nn.Conv2d(inputs, width, 1), nn.Conv2d(width, inputs, 1)
        elif kind != "pool":
            self.conv = nn.Conv2d(inputs, self.outputs, 3, self.stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(self.outputs)

    def forward(self, x):
        if self.kind == "concat":
            x = torch.cat([self.left(x), self.right(x)], 1)
        elif self.kind == "residual":
            x = x + F.relu(self.conv(x))
        elif self.kind == "inverted":
            x = x + self.project(self.conv(F.relu(self.middle(self.expand(x)))))
        elif self.kind == "grouped":
            x = self.conv(F.relu(self.before(x)))
        elif self.kind == "zeropad":
            x = self.conv(F.relu(self.first(x))) + self.shortcut(x)
        elif self.kind == "gate":
            x = x * torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        elif self.kind == "pool":
            x = F.max_pool2d(x, 3, 1, 1)
        else:
            x = self.conv(x)
        return F.relu(self.norm(x))


class Random(nn.Module):
    def __init__(self, stem: int, steps: list[tuple[str, int, int]], flat: bool):
        super().__init__()
        self.stem, self.flat = nn.Conv2d(3, stem, 3, 1, 1), flat
        blocks, channels = [], stem
        for kind, width, stride in steps:
            blocks.append(Block(kind, channels, width, stride))
            channels = blocks[-1].outputs
        self.blocks = nn.Sequential(*blocks)
        self.linear = nn.Linear(channels * (4 if flat else 1), 5)

    def forward(self, x):
        x = self.blocks(self.stem(x))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(x, 2 if self.flat else 1), 1))


STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(2, 9), st.sampled_from([1, 2])), min_size=1, max_size=5)


@st.composite
def networks(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    model = settle(Random(draw(st.integers(2, 9)), draw(STEPS), draw(st.booleans())))
    return model, legr.trace(model, torch.zeros(1, 3, SIDE, SIDE))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks(), st.integers(0, 1000), st.sampled_from([0.2, 0.5, 0.8]))
def test_pruned_equals_masked_and_flops_equal_pytorchs(made, seed, share):
    model, graph = made
    kept = random_kept(graph, seed, share)
    small = legr.prune(model, graph, kept)
    assert graph.flops() == counted(model, SIDE)
    assert graph.flops(kept) == counted(small, SIDE)
    assert graph.params() == sum(p.numel() for p in model.parameters())
    assert graph.params(kept) == sum(p.numel() for p in small.parameters())
    x = torch.randn(2, 3, SIDE, SIDE)
    with torch.inference_mode():
        expected = silenced(model, graph, kept)(x)
        scale = expected.abs().max().clamp(min=1)
        torch.testing.assert_close(small(x) / scale, expected / scale, rtol=1e-5, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks(), st.integers(0, 1000))
def test_selection_is_monotone_respects_the_floor_and_stops_at_the_first(made, seed):
    _, graph = made
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(width, generator=generator) for width in graph.widths]
    larger = None
    for fraction in (1.0, 0.9, 0.75, 0.6, 0.45, 0.3):
        try:
            kept = legr.select(graph, scores, fraction)
        except legr.UserError as error:
            lowest = float(str(error).rsplit(" ", 1)[1])
            assert fraction <= lowest <= 1
            if lowest < 1:  # what the message promises holds
                legr.select(graph, scores, lowest)
            break
        for layer, mask in zip(graph.layers, kept, strict=True):
            gone = int((~mask).sum())
            assert gone <= int(MAX_PRUNED * layer.width)
            assert gone == 0 or layer.width - gone >= MIN_WIDTH
        if larger is not None:
            assert all((small <= large).all() for small, large in zip(kept, larger, strict=True))
        if fraction < 1:
            assert graph.flops(kept) < fraction * graph.flops()
            units = graph.kept_units(kept)
            importance = torch.zeros(graph.unit_count)
            for own, score in zip(graph.units, scores, strict=True):
                free = torch.from_numpy(own >= 0)
                importance.index_add_(0, torch.from_numpy(own)[free], score[free])
            last = max((u for u in range(graph.unit_count) if not units[u]), key=lambda u: float(importance[u]))
            units[last] = True  # one fewer dropped is not below the target yet
            assert graph.flops(graph.masks(units)) >= fraction * graph.flops()
        larger = kept


@settings(max_examples=60, deadline=None, derandomize=True)
@given(networks(), st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from(["flops", "params"]))
def test_budgets_hold_and_widths_are_rounded(made, seed, round_to, budget):
    _, graph = made
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(width, generator=generator) for width in graph.widths]
    cost = {"flops": graph.flops, "params": graph.params}[budget]
    total = np.bincount(graph.space)
    for select, fraction in itertools.product((legr.select, legr.select_uniform), (0.9, 0.7, 0.5)):
        try:
            kept = select(graph, scores, **{budget: fraction}, round_to=round_to)
        except legr.UserError as error:
            assert f"{budget} is {fraction}; the lowest reachable" in str(error)
            continue
        assert cost(kept) < fraction * cost()
        left = np.bincount(graph.space[graph.kept_units(kept)], minlength=len(total))
        assert ((left % round_to == 0) | (left == total)).all()
