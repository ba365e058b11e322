"""Networks as files: written, and read in a process that has not this package."""

import subprocess
import sys

import pytest
import torch

import legr
from experiments.interactive import export

ALONE = """
import sys
from load import difference
print(difference("small"), {"legr", "experiments"} & {name.partition(".")[0] for name in sys.modules})
"""


def test_a_pruned_network_is_read_without_this_package(tmp_path):
    """A MobileNetV2, with depthwise convolutions, by load.py in another process. test_explorer.py tests ONNX files."""
    torch.manual_seed(0)
    model = export.classifier("mobilenet_v2", 4).eval()
    graph = legr.trace(model, torch.zeros(1, 3, 32, 24), check=False)
    kept = legr.select_uniform(graph, legr.filter_norms(model, graph), 0.4)
    about = {"architecture": "mobilenet_v2", "classes": ["a", "b", "c", "d"]}
    small = legr.prune(model, graph, kept)
    export.save({"small": small}, {"small": about}, torch.randn(3, 3, 32, 24), tmp_path, [])
    files = {"small.safetensors", "small.json", "check.safetensors", "load.py"}
    assert files == {path.name for path in tmp_path.iterdir()}
    alone = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True, check=True)
    difference, imported = alone.stdout.split(maxsplit=1)
    assert float(difference) < 1e-5 and imported.strip() == "set()"


def test_weights_for_imagenet_are_taken_but_for_the_last_layer(monkeypatch):
    state = export.classifier("squeezenet1_1", 1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda self, **options: state)
    model = export.classifier("squeezenet1_1", 7, pretrained=True)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, state[name])}
    assert set(state) - same == {"classifier.1.weight", "classifier.1.bias"}


def test_weights_that_do_not_come_are_one_sentence(monkeypatch):
    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", offline)
    with pytest.raises(legr.UserError, match="pretrained is True: no route to host"):
        export.classifier("squeezenet1_1", 4, pretrained=True)
