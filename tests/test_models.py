"""The networks and their weights as files."""

import os

import pytest
import torch

import legr
from legr.models import CifarResNet, build, load_weights, save_weights
from tests.conftest import settle


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(("name", "parameters"), [("resnet56", 853_018), ("mobilenet_v2", 2_236_682)])
def test_a_network_is_built_by_its_name_and_seed(name, parameters):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    model = build(name, 10, 0)
    assert torch.equal(torch.rand(1), expected)  # whoever draws next draws what it would have
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert same(build(name, 10, 0), model) and not same(build(name, 10, 1), model)
    with pytest.raises(legr.UserError, match="model is 'resnet57'; it must be one of resnet56, mobilenet_v2"):
        build("resnet57", 10, 0)


def test_saved_weights_come_back_at_half_precision(tmp_path):
    model, path = settle(CifarResNet(1)), tmp_path / "deeper" / "weights.safetensors"
    save_weights(model, path)
    again = load_weights(CifarResNet(1), path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor.half().float() if tensor.dim() > 1 else tensor)
    save_weights(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert same(load_weights(CifarResNet(1), tmp_path / "weights.pth"), model)


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_a_bad_archive_is_one_sentence_and_code_in_one_is_never_run(tmp_path, name):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / name
    with pytest.raises(legr.UserError, match=f"^weights file .*{name} does not exist.*$"):
        load_weights(CifarResNet(1), path)
    for content, size in ((CifarResNet(1).state_dict(), 5000), ({}, 10), ({}, 0), ({"conv1.weight": Evil()}, None)):
        torch.save(content, path)
        os.truncate(path, path.stat().st_size if size is None else size)
        with pytest.raises(legr.UserError, match=f"^weights file .*{name} can't be loaded into CifarResNet.*$"):
            load_weights(CifarResNet(1), path)
    assert not (tmp_path / "ran").exists()
