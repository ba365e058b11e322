"""Networks as ONNX Runtime executes them: what a user without PyTorch would run."""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from torch import Tensor, nn


class OnnxNetwork(nn.Module):
    """A network exported to ONNX; images [N, 3, side, side] to logits, on the CPU, in float32."""

    def __init__(self, network: nn.Module, side: int, threads: int):
        super().__init__()
        example, batch = torch.zeros(2, 3, side, side), torch.export.Dim("batch")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait for work in a loop would take the cores from the network that is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            torch.onnx.export(
                network.eval(),
                (example,),
                file,
                input_names=["images"],
                dynamic_shapes=({0: batch},),
                external_data=False,
                verbose=False,
            )
            self.session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self.session.run(None, {"images": images.contiguous().numpy()})
        return torch.from_numpy(logits)
