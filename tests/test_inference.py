"""The network that evaluates fast says what the plain one says."""

import pytest
import torch
import torchvision

import legr
from legr import models
from legr.inference import FusedConvolution, can_be_fast, fast_inference
from tests.conftest import settle


class Awkward(torch.nn.Module):
    """Everything that must not be fused: values used twice, sums in the wrong order or of other shapes."""

    def __init__(self):
        super().__init__()
        conv = torch.nn.Conv2d
        self.first, self.second = conv(3, 8, 3, padding=1), conv(8, 8, 3, padding=1)
        self.third, self.fourth = conv(8, 8, 1), conv(8, 8, 1)
        self.same, self.reflected = conv(8, 8, 3, padding="same"), conv(8, 8, 3, 1, 1, padding_mode="reflect")
        self.bn, self.six, self.linear = torch.nn.BatchNorm2d(8), torch.nn.ReLU6(), torch.nn.Linear(8, 10)

    def forward(self, x):
        x = self.first(x)
        y = torch.relu(x) + x  # two users
        y = 2 * self.second(y) + 1
        z = self.fourth(y)  # reads y before it changes
        y = self.six(y.relu_() + z)
        y = y + self.bn(self.third(y)) + self.third_again(y)
        return self.linear(torch.relu(y).mean((2, 3)))

    def third_again(self, y):
        pooled = torch.nn.functional.adaptive_avg_pool2d(y, 1)  # is broadcast over the image
        return self.same(y) + pooled + self.reflected(y)


NETWORKS = {
    "resnet56": lambda: (models.resnet56(), 32),
    "mobilenet_v2": lambda: (models.mobilenet_v2(10), 64),
    "resnet18": lambda: (torchvision.models.resnet18(num_classes=10), 64),
    "awkward": lambda: (Awkward(), 16),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("cut", [False, True])
def test_outputs_are_the_networks_own(name, cut):
    torch.manual_seed(0)
    network, side = NETWORKS[name]()
    settle(network).eval()
    graph = legr.trace(network, torch.zeros(1, 3, side, side))
    if cut:
        norms = legr.filter_norms(network, graph)
        network = legr.prune(network, graph, legr.select_uniform(graph, norms, 0.6))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    x = torch.randn(5, 3, side, side)
    with torch.inference_mode():
        plain, fast = network(x), fast_inference(network, torch.float32)(x)
        assert (plain - fast).abs().max() < 1e-4 * plain.abs().max()
        assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
        assert torch.equal(fast_inference(network, torch.float32, in_place=True)(x), fast)


@pytest.mark.skipif(not can_be_fast("cpu", torch.bfloat16), reason="needs a processor with bfloat16")
def test_bfloat16_is_as_close_as_autocast():
    torch.manual_seed(0)
    network = settle(models.resnet56()).eval()
    x = torch.randn(64, 3, 32, 32)
    with torch.inference_mode():
        plain, fast = network(x), fast_inference(network, torch.bfloat16)(x)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(x)
    assert (plain - fast).abs().mean() < 1.5 * (plain - half).abs().mean()


def test_a_pruned_resnet_is_nothing_but_fused_convolutions():
    network = models.resnet56()
    graph = legr.trace(network, torch.zeros(1, 3, 32, 32))
    small = legr.prune(network, graph, legr.select_uniform(graph, legr.filter_norms(network, graph), 0.5))
    fast = fast_inference(small, torch.float32).network
    assert sum(isinstance(m, FusedConvolution) for m in fast.modules()) == 55
    left = {str(node.target) for node in fast.graph.nodes if node.op == "call_function"}
    assert not any(word in name for name in left for word in ("relu", "add"))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fast.modules())


def test_where_it_can_not_be_fast_it_says_so():
    assert can_be_fast("cpu", torch.float32) == torch.backends.mkldnn.is_available()
    assert not can_be_fast("cuda:0", torch.float32)
