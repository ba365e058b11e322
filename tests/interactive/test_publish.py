"""Networks as files: written, and read in a process that has not this package."""

import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

import legr
from experiments.interactive import export


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A pruned MobileNetV2, with depthwise convolutions; its folder."""
    torch.manual_seed(0)
    model = export.classifier("mobilenet_v2", 4).eval()
    graph = legr.trace(model, torch.zeros(1, 3, 32, 24))
    kept = legr.select_uniform(graph, legr.filter_norms(model, graph), 0.4)
    small, folder = legr.prune(model, graph, kept), tmp_path_factory.mktemp("networks")
    about = {"architecture": "mobilenet_v2", "classes": ["a", "b", "c", "d"]}
    export.save({"small": small}, {"small": about}, torch.randn(3, 3, 32, 24), folder)
    return folder


ALONE = """
import sys
from load import difference
print(difference("small"), {"legr", "experiments"} & {name.partition(".")[0] for name in sys.modules})
"""


@pytest.mark.slow
def test_a_pruned_network_is_read_without_this_package(published):
    """By load.py in another process, and by ONNX Runtime."""
    files = {f"small.{suffix}" for suffix in ("safetensors", "json", "onnx")} | {"check.safetensors", "load.py"}
    assert files == {path.name for path in published.iterdir() if path.is_file()}
    alone = subprocess.run([sys.executable, "-c", ALONE], cwd=published, capture_output=True, text=True, check=True)
    difference, imported = alone.stdout.split(maxsplit=1)
    assert float(difference) < 1e-5 and imported.strip() == "set()"
    check = load_file(published / "check.safetensors")
    session = onnxruntime.InferenceSession(published / "small.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: check["inputs"].numpy()})
    assert np.allclose(logits, check["small"], atol=1e-4)


def test_weights_for_imagenet_are_taken_but_for_the_last_layer(monkeypatch):
    state = export.classifier("squeezenet1_1", 1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda self, **options: state)
    model = export.classifier("squeezenet1_1", 7, pretrained=True)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, state[name])}
    assert set(state) - same == {"classifier.1.weight", "classifier.1.bias"}


def test_an_architecture_there_is_not_and_weights_that_do_not_come_are_one_sentence(monkeypatch):
    with pytest.raises(
        legr.UserError, match="^architecture is 'resnet19', pretrained is False: Unknown model resnet19"
    ):
        export.classifier("resnet19", 4)

    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", offline)
    with pytest.raises(legr.UserError, match="pretrained is True: no route to host"):
        export.classifier("squeezenet1_1", 4, pretrained=True)
