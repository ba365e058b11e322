"""Networks as files: written, and read in a process that has not this package."""

import pytest
import torch

import legr
from experiments import publish


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A pruned MobileNetV2, with depthwise convolutions; its folder."""
    torch.manual_seed(0)
    model = publish.classifier("mobilenet_v2", 4).eval()
    graph = legr.trace(model, torch.zeros(1, 3, 32, 24))
    kept = legr.select_uniform(graph, legr.filter_norms(model, graph), 0.4)
    small, folder = legr.prune(model, graph, kept), tmp_path_factory.mktemp("networks")
    about = {"architecture": "mobilenet_v2", "classes": ["a", "b", "c", "d"]}
    publish.save({"small": small}, {"small": about}, torch.randn(3, 3, 32, 24), folder)
    return folder


@pytest.mark.slow
def test_a_pruned_network_is_read_in_a_process_without_this_package(published):
    files = {f"small.{suffix}" for suffix in ("safetensors", "json", "onnx")} | {"check.safetensors", "load.py"}
    assert files == {path.name for path in published.iterdir() if path.is_file()}
    table = publish.read_back(["small"], published)
    assert table.loc["small", "load.py"] < 1e-5 and table.loc["small", "ONNX Runtime"] < 1e-4


MISTAKES = {
    "another network": (
        lambda text: text.replace("network.eval()", "network.train()"),
        r"small .* read back by load\.py",
    ),
    "this package": (lambda text: text.replace("import torchvision", "import torchvision, legr"), "imported legr; it"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("change", "message"), MISTAKES.values(), ids=MISTAKES)
def test_what_is_read_back_otherwise_is_one_sentence(published, change, message):
    script = published / "load.py"
    before = script.read_text()
    script.write_text(change(before))
    try:
        with pytest.raises(legr.UserError, match=message):
            publish.read_back(["small"], published)
    finally:
        script.write_text(before)


def test_weights_for_imagenet_are_taken_but_for_the_last_layer(monkeypatch):
    state = publish.classifier("squeezenet1_1", 1000).state_dict()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda self, **options: state)
    model = publish.classifier("squeezenet1_1", 7, pretrained=True)
    same = {name for name, tensor in model.state_dict().items() if torch.equal(tensor, state[name])}
    assert set(state) - same == {"classifier.1.weight", "classifier.1.bias"}


def test_an_architecture_there_is_not_and_weights_that_do_not_come_are_one_sentence(monkeypatch):
    with pytest.raises(
        legr.UserError, match="^architecture is 'resnet19', pretrained is False: Unknown model resnet19"
    ):
        publish.classifier("resnet19", 4)

    def offline(self, **options):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", offline)
    with pytest.raises(legr.UserError, match="pretrained is True: no route to host"):
        publish.classifier("squeezenet1_1", 4, pretrained=True)
