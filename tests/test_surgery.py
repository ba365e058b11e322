"""The pruned network is a copy, can be pruned again, and comes back from a file."""

import pytest
import torch
from torch import nn

import legr
from legr.models import load_weights, save_weights
from tests.conftest import random_kept


def test_the_original_is_left_alone_and_the_copy_is_free(network):
    network.train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    graph = legr.trace(network, torch.zeros(1, 3, 32, 32))
    assert network.training
    small = legr.prune(network, graph, random_kept(graph, 0))
    assert small.training
    called = []
    network.get_submodule(graph.layers[0].name).register_forward_hook(lambda *_: called.append("the original"))
    small(torch.randn(2, 3, 32, 32)).sum().backward()
    assert not called
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert set(small.state_dict()) == set(before)


def test_a_pruned_network_is_pruned_again_and_another_is_not(small):
    model, graph = small
    kept = random_kept(graph, 1)
    once = legr.prune(model, graph, kept)
    again = legr.trace(once, torch.zeros(1, 3, 32, 32))
    assert (again.flops(), again.params()) == (graph.flops(kept), graph.params(kept))
    twice = legr.prune(once, again, legr.select(again, legr.filter_norms(once, again), 0.5))
    assert twice(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    with pytest.raises(legr.UserError, match="model has other layers than the network that graph was traced from"):
        legr.prune(nn.Conv2d(3, 3, 1), graph, kept)


def test_a_pruned_networks_weights_come_back_into_it(network, tmp_path):
    graph = legr.trace(network, torch.zeros(1, 3, 32, 32))
    small, again = (legr.prune(network, graph, random_kept(graph, 1)) for _ in range(2))
    save_weights(small, tmp_path / "small.safetensors")
    nn.init.zeros_(again.get_submodule(graph.layers[0].name).weight)
    load_weights(again, tmp_path / "small.safetensors")
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(again(x), small(x), rtol=0.01, atol=0.01)  # at half precision
