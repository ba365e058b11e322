"""Networks of other people: pruned correctly, left whole in part, or refused in a sentence; never silently wrong."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth
from torchvision.transforms.v2 import Normalize

import legr
from legr.data import Images
from legr.fitness import for_evaluation
from legr.training import recalibrate
from tests.conftest import assert_same_gradients, settle, silenced
from tests.library.test_graph import counted


class Net(nn.Module):
    """conv1, a function of the network and its feature map, conv2, pooling, linear."""

    def __init__(self, function=lambda own, x: x, width=8, **modules):
        super().__init__()
        self.function = function
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(width, 6, 3, padding=1)
        for name, module in modules.items():
            setattr(self, name, module)
        self.linear = nn.Linear(6, 5)

    def forward(self, x):
        x = self.conv2(F.relu(self.function(self, self.conv1(x))))
        return self.linear(F.relu(x).mean((2, 3)))


class Standardized(nn.Conv2d):
    """Its weight is standardized over its inputs, all of them."""

    def forward(self, x):
        mean, deviation = self.weight.mean((1, 2, 3), keepdim=True), self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / deviation, self.bias, self.stride, self.padding)


class CentredInTraining(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x - x.mean(1, keepdim=True) if self.training else x)


class DropPath(nn.Module):
    """Stochastic depth as many write it; torch.fx can't trace it."""

    def forward(self, x):
        return x * (torch.rand(x.shape[0], 1, 1, 1) < 0.5) if self.training else x


class Scaled(torch.autograd.Function):
    """Passes on what it gets, and the gradient times a number; without one, by the number of channels."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (ctx.factor or 1 / gradient.shape[1]), None


class Reversal(nn.Module):
    def forward(self, x):
        return Scaled.apply(x, -1.0)


def chunks(own, x):
    parts = list(x.chunk(2, 1))
    parts.extend(layer(parts[-1]) for layer in own.a)
    return torch.cat(parts, 1)


def counted_by_a_profiler():
    net = Net(lambda own, x: own.b(own.a(x)), a=nn.BatchNorm2d(8), b=nn.PReLU())
    for module in net.modules():
        module.register_buffer("total_ops", torch.zeros(1, dtype=torch.float64))
    return net


def squeeze_and_excite(own, x):
    b, c, _, _ = x.size()
    gate = own.down(F.adaptive_avg_pool2d(x, 1).view(b, c))
    return x * torch.sigmoid(own.up(F.relu(gate))).view(b, c, 1, 1).expand_as(x)


def shuffle(own, x):
    n, c, h, w = x.size()
    return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


def down_and_up(own, x):
    return torch.cat([x, F.interpolate(own.a(F.max_pool2d(x, 2)), scale_factor=2)], 1)


def again(own, x):
    return own.inner(F.relu(own.inner(x)))


def tied():
    net = Net(lambda own, x: own.a(x) + own.b(x), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1))
    net.b.weight = net.a.weight
    return net


def conv(**options):
    return nn.Conv2d(8, 8, 3, padding=1, **options)


NETWORKS = {  # name: (network, its prunable layers, what stays whole)
    "zero scale": (
        lambda: Net(lambda own, x: x + 0 * own.a(x), a=Standardized(8, 8, 1)), ["conv2"], ("a", "computes otherwise"),
    ),
    "number of channels": (lambda: Net(lambda own, x: x + x / x.numel()), ["conv2"], ("itself", "truediv")),
    "by mode": (lambda: Net(lambda own, x: own.a(x), a=CentredInTraining(8)), ["conv2"], ("a", "computes otherwise")),
    "drop path": (lambda: Net(lambda own, x: own.d(own.a(x)), a=conv(), d=DropPath()), ["conv1", "a", "conv2"], None),
    "function": (
        lambda: Net(lambda own, x: F.conv2d(x, own.a.weight), a=conv(bias=False)), ["conv2"], ("itself", "conv2d"),
    ),
    "weight read": (lambda: Net(lambda own, x: x * own.conv1.weight.mean()), ["conv2"], ("conv1", "used twice")),
    "FrozenBatchNorm": (lambda: Net(lambda own, x: own.a(x), a=FrozenBatchNorm2d(8)), ["conv2"], ("a", "buffer")),
    "GroupNorm": (lambda: Net(lambda own, x: own.a(x), a=nn.GroupNorm(2, 8)), ["conv2"], ("a", "GroupNorm")),
    "PReLU": (lambda: Net(lambda own, x: own.b(own.a(x)), a=nn.PReLU(8), b=nn.PReLU()), ["conv1", "conv2"], None),
    "arithmetic": (
        lambda: Net(lambda own, x: (-x / 2.0).clamp(max=3) - torch.tensor(3.0) * x.abs()), ["conv1", "conv2"], None,
    ),
    "one after the other mean": (
        lambda: Net(lambda own, x: x + x.mean(3).mean(2)[:, :, None, None]), ["conv1", "conv2"], None,
    ),
    "slice of channels": (lambda: Net(lambda own, x: x[:, :4], width=4), ["conv2"], ("itself", "getitem")),
    "channel shuffle": (lambda: Net(shuffle), ["conv2"], ("itself", "view")),
    "squeeze and excitation": (
        lambda: Net(squeeze_and_excite, down=nn.Linear(8, 4), up=nn.Linear(4, 8)), ["conv1", "conv2"], None,
    ),
    "transposed": (
        lambda: Net(lambda own, x: own.a(x), a=nn.ConvTranspose2d(8, 8, 2, 2)), ["conv2"], ("a", "ConvTranspose2d"),
    ),
    "U-Net": (lambda: Net(down_and_up, 16, a=conv()), ["conv1", "a", "conv2"], None),
    "used twice": (
        lambda: Net(again, inner=nn.Sequential(conv(), nn.BatchNorm2d(8))), ["conv2"], ("inner", "used twice"),
    ),
    "one number": (
        lambda: Net(lambda own, x: x + own.b * own.a(x), a=conv(), b=nn.Parameter(torch.ones(1))),
        ["conv1", "a", "conv2"], None,
    ),
    "attention over positions": (
        lambda: Net(lambda own, x: torch.sigmoid(own.a(x)) * x, a=nn.Conv2d(8, 1, 1)), ["conv1", "conv2"], None,
    ),
    "pad by half": (
        lambda: Net(lambda own, x: F.pad(x, (0, 0, 0, 0, x.size(1) // 4, 2)), 12), ["conv2"], ("itself", "computed"),
    ),
    "tied": (tied, ["conv2"], ("b", "used twice")),
    "groups": (lambda: Net(lambda own, x: own.a(x), a=conv(groups=2)), ["conv2"], ("a", "groups")),
    "gradient reversal": (
        lambda: nn.Sequential(nn.Conv2d(3, 3, 1), Reversal(), Net()), ["0", "2.conv1", "2.conv2"], None,
    ),
    "function of its own": (lambda: Net(lambda own, x: Scaled.apply(x, -1.0)), ["conv1", "conv2"], None),
    "gradient by width": (
        lambda: Net(lambda own, x: Scaled.apply(x, None)), ["conv2"], ("itself", "computes otherwise"),
    ),
    "list of chunks": (
        lambda: Net(chunks, 12, a=nn.ModuleList([nn.Conv2d(4, 4, 1)])), ["a.0", "conv2"], ("itself", "chunk"),
    ),
    "unpacked sizes": (
        lambda: Net(lambda own, x: x * x.view(*x.shape[: len(x.shape) - 2], -1).mean(2)[:, :, None, None]),
        ["conv1", "conv2"], None,
    ),
    "profiler": (counted_by_a_profiler, ["conv1", "conv2"], None),
    "normalization": (
        lambda: nn.Sequential(Normalize([0.5] * 3, [0.2] * 3), Net()), ["1.conv1", "1.conv2"], ("0", "Normalize"),
    ),
    "log-softmax behind BatchNorm": (
        lambda: nn.Sequential(Net(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3), nn.LogSoftmax(1)),
        ["0.conv1", "0.conv2"], None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_the_pruned_network_is_the_masked_one(name, compute):
    build, layers, whole = NETWORKS[name]
    torch.manual_seed(0)
    model = settle(build())
    graph = legr.trace(model, torch.zeros(1, 3, 8, 8))
    assert [layer.name for layer in graph.layers] == layers
    assert whole is None or any(whole[0] in owner and whole[1] in why for owner, why in graph.whole.items())
    assert graph.params() == sum(p.numel() for p in model.parameters())
    assert graph.flops() == counted(model, 3, 8, 8)
    kept = legr.select(graph, legr.filter_norms(model, graph), target=0.9, cost=graph.params)
    small, x = legr.prune(model, graph, kept), torch.randn(2, 3, 8, 8)
    assert graph.params(kept) == sum(p.numel() for p in small.parameters()) < graph.params()
    masked = silenced(copy.deepcopy(model), graph, kept)
    torch.testing.assert_close(small(x), masked(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(for_evaluation(copy.deepcopy(small), compute)(x), small(x), rtol=1e-4, atol=1e-5)
    assert_same_gradients(small, masked, graph, kept, x)


def dropped(own, x):
    return F.dropout(x, 0.5, own.training)


def branching(own, x):
    return x if x.sum() > 0 else -x


def without_gradient(own, x):
    with torch.no_grad():
        return own.a(x)


def hooked():
    inner = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    inner.register_full_backward_hook(lambda module, before, after: (-before[0],))
    return nn.Sequential(nn.Conv2d(3, 3, 1), inner, Net())


def images(*shape, **options):
    return torch.zeros(1, *(shape or (3, 8, 8)), **options)


WEIGHT_NORM = parametrizations.weight_norm(nn.Conv2d(3, 4, 1))


@pytest.mark.parametrize(
    ("model", "example", "message"),
    [
        (Net(branching), images(), "module .* can't be traced by torch.fx: .*control flow"),
        (Net(lambda own, x: x * 2 if own.training else x), images(), "other things in training than in evaluation"),
        (
            Net(lambda own, x: torch.stack([own.a(each) for each in x.unbind(0)]), a=conv()),
            images(),
            "the network can't be run when it is traced|differs in evaluation",
        ),
        (Net(without_gradient, a=conv()), images(), r"gradient of .* differs in evaluation when .*torch.no_grad"),
        (hooked(), images(), "the gradient of 0.bias differs in evaluation when it is traced, by something .*a hook"),
        (nn.Sequential(nn.DataParallel(Net())), images(), r"model\.0 is a DataParallel; hand in model\.0\.module"),
        (nn.Sequential(WEIGHT_NORM), images(), "module 0 computes its weight from other tensors; remove that first"),
        (nn.Sequential(nn.LazyConv2d(8, 3), Net()), images(), "0.weight is lazy, complex or on the meta device"),
        (nn.Sequential(nn.Flatten(), nn.Linear(192, 5)), images(), "this network has no layers that can be pruned"),
        (Net().state_dict(), images(), "model is of type OrderedDict; it must be a torch.nn.Module"),
        (Net(), images(1, 8, 8), "expected input.* to have 3 channels, but got 1"),
        (Net(), images(dtype=torch.uint8), "example_input of shape .* and type torch.uint8 does not fit"),
        (Net(), (1, 3, 8, 8), "example_input is of type tuple"),
    ],
)
def test_what_cannot_be_traced_is_refused_in_one_sentence(model, example, message, capfd):
    with pytest.raises(legr.UserError, match=message) as error:
        legr.trace(model, example)
    assert "\n" not in str(error.value) and not capfd.readouterr().err


def pruned(model, target=0.6):
    """The network with its smaller filters gone."""
    graph = legr.trace(model, images())
    return legr.prune(model, graph, legr.select(graph, legr.filter_norms(model, graph), target))


@pytest.mark.parametrize(
    "build", [lambda: Net(dropped), lambda: Net(lambda own, x: x + own.a(x), a=StochasticDepth(0.5, "row"))]
)
def test_randomness_follows_the_mode(build, compute):
    small, x = pruned(build().eval()), torch.ones(4, 3, 8, 8)
    assert torch.equal(small(x), small(x))
    torch.testing.assert_close(for_evaluation(copy.deepcopy(small), compute)(x), small(x))
    for network in (small, pickle.loads(pickle.dumps(small))):
        network.train()
        assert not torch.equal(network(x), network(x))


def test_buffers_may_change_after_tracing():
    model = Net(lambda own, x: own.a(x), a=FrozenBatchNorm2d(8))
    graph = legr.trace(model, torch.zeros(1, 3, 8, 8))
    model.a.running_mean += 1
    small, x = legr.prune(model, graph, graph.masks(np.ones(graph.unit_count, bool))), torch.ones(2, 3, 8, 8)
    torch.testing.assert_close(small(x), model(x))


def test_arguments_after_the_first_have_their_defaults():
    class Optional(Net):
        def forward(self, x, features=False, mask=None):
            x = super().forward(x)
            x = x if mask is None else x * mask
            return (x, x) if features else x

    model, x = Optional().eval(), torch.ones(2, 3, 8, 8)
    torch.testing.assert_close(pruned(model, 1.0)(x), model(x))


def test_a_frozen_batchnorm_stays_frozen(compute):
    class Frozen(Net):
        def train(self, mode=True):
            super().train(mode)
            self.a.eval()
            return self

    sevens = Images(torch.full((4, 3, 8, 8), 7, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
    for model in (
        Frozen(lambda own, x: own.a(x), a=nn.BatchNorm2d(8)),
        Net(lambda own, x: own.a(x), a=nn.BatchNorm2d(8)),
    ):
        model.train()
        model.a.eval()
        small = pruned(model).train()
        for network in (small, copy.deepcopy(small)):
            network(torch.randn(4, 3, 8, 8))
            recalibrate(network, sevens, compute)
            assert network.training and not network.a.training and (network.a.running_mean == 0).all()


def test_what_keeps_filters_is_told_where_a_target_cannot_be_reached():
    message = r"lowest reachable fraction .* 1 modules stay whole .* module a: GroupNorm"
    with pytest.raises(legr.UserError, match=message):
        pruned(Net(lambda own, x: own.a(x), a=nn.GroupNorm(2, 8)), 0.01)
