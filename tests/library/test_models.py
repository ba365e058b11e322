"""The networks and their weights as files."""

import os
from argparse import Namespace

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

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
    others = {"index": torch.tensor([[70_001]]), "out of reach": torch.tensor([[1e6]]), "view": model.bn1.weight[:4]}
    assert all(torch.equal(others[name], tensor) for name, tensor in legr.models.halved(others).items())
    save_weights(again, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


OTHER = {"conv1.weight": torch.ones(16, 3, 3, 3)}
RUN = {"args": Namespace(lr=0.1), "best": np.float64(93.5), "rng": np.ones(3), "model_params": {"depth": 8}}
CHECKPOINTS = {
    "a state dict": lambda s: s,
    "bfloat16": lambda s: {name: tensor.bfloat16() for name, tensor in s.items()},
    "of a training": lambda s: {**RUN, "state_dict": s, "optimizer": {"state": {0: torch.ones(2)}}},
    "with an average": lambda s: {"model": OTHER, "ema": {"decay": 0.9}, "ema_model": {"state_dict": s}},
    "wrapped twice": lambda s: {"net": prefixed("module._orig_mod.", s)},
    "Lightning's": lambda s: {"state_dict": prefixed("model.", s), "hyper_parameters": {"lr": 0.1}},
    "of an old torch": lambda s: {name: tensor for name, tensor in s.items() if "num_batches" not in name},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrap", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_checkpoint_of_any_kind_is_read(tmp_path, wrap, zipped):
    model, path = settle(CifarResNet(1)).bfloat16().float(), tmp_path / "weights.safetensors"
    torch.save(wrap(model.state_dict()), path, _use_new_zipfile_serialization=zipped)
    assert same(load_weights(settle(CifarResNet(1)), path), model)


def test_a_profilers_counters_are_ignored_and_named(tmp_path):
    model, path = CifarResNet(1), tmp_path / "weights.bin"
    save_file(prefixed("module.", model.state_dict()) | {"total_ops": torch.ones(1)}, path)
    with pytest.warns(UserWarning, match=r"counters ignored \(1\): 'total_ops'"):
        assert same(load_weights(CifarResNet(1), path), model)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
def test_code_in_an_archive_is_never_run(tmp_path, suffix, zipped):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    for content in (Evil(), CifarResNet(1).state_dict() | {"conv1.weight": Evil()}, {**RUN, "args": Evil()}):
        torch.save(content, tmp_path / f"weights{suffix}", _use_new_zipfile_serialization=zipped)
        with pytest.raises(legr.UserError, match="it holds more than tensors; save model.state_dict"):
            load_weights(CifarResNet(1), tmp_path / f"weights{suffix}")
    assert not (tmp_path / "ran").exists()


FAULTY = {
    "an optimizer": (lambda s: {"state": {0: s}}, "it has no state dict; save"),
    "more classes": (lambda s: s | {"linear.weight": torch.ones(12, 64)}, r"1 of another shape .*\[12, 64\], not \["),
    "a lack": (lambda s: {n: t for n, t in s.items() if n != "linear.bias"}, r"1 missing \(linear\.bias\)"),
    "half of it": (lambda s: save(s)[:5000], "empty, cut off or of another format"),
    "a pointer": (lambda s: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "run git lfs pull"),
}


@pytest.mark.parametrize(("spoil", "message"), FAULTY.values(), ids=FAULTY)
def test_a_refusal_is_one_sentence_and_leaves_the_model_as_it_was(tmp_path, spoil, message):
    model, before, path = CifarResNet(1), CifarResNet(1), tmp_path / "weights.pt"
    before.load_state_dict(model.state_dict())
    content = spoil({name: tensor + 1 for name, tensor in model.state_dict().items()})
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    for file, cause in ((path, message), (tmp_path, "Is a directory"), (tmp_path / "no.pt", "No such file")):
        with pytest.raises(legr.UserError, match=f"^weights file {file} can't be .*{cause}") as error:
            load_weights(model, file)
        assert str(error.value).isprintable() and same(model, before)
