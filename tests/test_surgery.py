"""The pruned network computes what the masked one does."""

import pytest
import torch
from torch import nn

import legr
from benchmarks.networks import silenced
from legr.surgery import load_pruned, save_pruned
from tests.conftest import random_kept, settle


@pytest.mark.parametrize("seed", range(4))
def test_pruned_equals_silenced(network, seed):
    graph = legr.trace(network, torch.zeros(1, 3, 32, 32))
    kept = random_kept(graph, seed, share=[0.2, 0.5, 0.8, 1.0][seed])
    small = legr.prune(network, graph, kept)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        torch.testing.assert_close(small(x), silenced(network, graph, kept)(x), rtol=1e-5, atol=1e-5)
    expected = [int(k.sum()) for k in kept]
    assert [small.get_submodule(layer.name).out_channels for layer in graph.layers] == expected


@pytest.mark.parametrize(("name", "classes", "side"), [("resnet56", 10, 32), ("mobilenet_v2", 100, 64)])
def test_pruned_equals_masked_on_the_papers_networks(name, classes, side):
    model = settle(legr.models.build(name, classes, 0))
    graph = legr.trace(model, torch.zeros(1, 3, side, side))
    kept = random_kept(graph, 0)
    small = legr.prune(model, graph, kept)
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = silenced(model, graph, kept)(x)
        scale = expected.abs().max()
        torch.testing.assert_close(small(x) / scale, expected / scale, rtol=1e-5, atol=1e-5)


def test_the_original_is_left_alone_and_the_copy_is_free(network):
    graph = legr.trace(network, torch.zeros(1, 3, 32, 32))
    before = {k: v.clone() for k, v in network.state_dict().items()}
    network.train()
    small = legr.prune(network, graph, random_kept(graph, 0))
    assert small.training
    small(torch.randn(2, 3, 32, 32)).sum().backward()
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())
    assert set(small.state_dict()) == set(before)


def test_a_saved_network_comes_back(small, tmp_path):
    model, graph = small
    kept = random_kept(graph, 1)
    cut = legr.prune(model, graph, kept)
    save_pruned(cut, graph, kept, tmp_path / "cut.safetensors")
    again, masks = load_pruned(model, graph, tmp_path / "cut.safetensors")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(x), cut(x))
    assert all(torch.equal(a, b) for a, b in zip(kept, masks, strict=True))
    whole = (tmp_path / "cut.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(legr.UserError, match="not a whole safetensors file"):
        load_pruned(model, graph, tmp_path / "cut.safetensors")


def test_pruning_another_network_is_an_error(small):
    _, graph = small
    with pytest.raises(legr.UserError, match="traced from another network"):
        legr.prune(nn.Conv2d(3, 3, 1), graph, random_kept(graph, 0))
