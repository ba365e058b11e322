"""The pruned network is a copy, and can be pruned again."""

import pytest
import torch
from torch import nn

import legr
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
    model.linear = nn.Linear(64, 13)
    with pytest.raises(legr.UserError, match="model has other layers than the network that graph was traced from"):
        legr.prune(model, graph, kept)
