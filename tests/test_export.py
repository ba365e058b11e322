"""What is written as ONNX computes what the network computes, for any batch."""

import onnx
import onnxruntime
import pytest
import torch

import legr
from legr.export import to_onnx
from tests.conftest import settle
from tests.test_inference import NETWORKS


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    return torch.from_numpy(logits)


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_the_pruned_networks_own(name, tmp_path):
    torch.manual_seed(0)
    network, side = NETWORKS[name]()
    settle(network).train()
    graph = legr.trace(network, torch.zeros(1, 3, side, side))
    small = legr.prune(network, graph, legr.select_uniform(graph, legr.filter_norms(network, graph), 0.6))
    before = {k: v.clone() for k, v in small.state_dict().items()}
    to_onnx(small, tmp_path / "small.onnx", side)
    assert small.training and all(torch.equal(v, before[k]) for k, v in small.state_dict().items())
    small.eval()
    for batch in (1, 5):
        x = torch.randn(batch, 3, side, side)
        with torch.inference_mode():
            plain = small(x)
        assert (plain - run(tmp_path / "small.onnx", x)).abs().max() < 1e-4 * plain.abs().max()


@pytest.mark.parametrize("cut", [False, True])
def test_shortcuts_leave_no_slices_and_pads(cut, tmp_path):
    network = settle(legr.models.resnet56()).eval()
    if cut:
        graph = legr.trace(network, torch.zeros(1, 3, 32, 32))
        network = legr.prune(network, graph, legr.select_uniform(graph, legr.filter_norms(network, graph), 0.6))
    to_onnx(network, tmp_path / "network.onnx", 32)
    kinds = {node.op_type for node in onnx.load(tmp_path / "network.onnx").graph.node}
    assert "Conv" in kinds and not kinds & {"Pad", "Slice"}


class Padded(torch.nn.Module):
    """Pads and slices that are no such shortcuts must stay what they are."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3)

    def forward(self, x):
        pad = torch.nn.functional.pad
        y = pad(self.conv(pad(x, (1, 1, 1, 1))), (0, 0, 0, 0, 1, 2), "constant", 0.5)
        z = pad(x[:, :, 1::2, 1::2], (0, 0, 0, 0, 2, 4)) + pad(x, (0, 0, 0, 0, 6, 0))[:, :, ::2, ::2]
        return y[:, :, ::2, ::2].mean((2, 3)) + z.mean((2, 3))


def test_other_pads_stay(tmp_path):
    network, x = Padded().eval(), torch.randn(3, 3, 8, 8)
    to_onnx(network, tmp_path / "network.onnx", 8)
    torch.testing.assert_close(run(tmp_path / "network.onnx", x), network(x).detach(), atol=1e-5, rtol=1e-4)


def test_a_side_without_pixels_is_refused(tmp_path):
    with pytest.raises(legr.UserError, match="side is 0; it must be a positive number"):
        to_onnx(legr.models.resnet56(), tmp_path / "network.onnx", 0)
    assert not list(tmp_path.iterdir())
