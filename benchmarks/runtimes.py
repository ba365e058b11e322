"""Networks as ONNX Runtime executes them: what a user without PyTorch would run."""

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from legr.export import to_onnx


class OnnxNetwork(nn.Module):
    """A network exported to ONNX; images [N, 3, side, side] to logits, on the CPU, in float32."""

    def __init__(self, network: nn.Module, side: int):
        super().__init__()
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "network.onnx"
            to_onnx(network, file, side)
            self.exported = file.read_bytes()
        self.use(threads=1)

    def use(self, threads: int) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Threads that wait for work in a loop would take the cores from the network that is timed next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self.session = onnxruntime.InferenceSession(self.exported, options, providers=["CPUExecutionProvider"])
        self.binding = self.session.io_binding()
        self.classes = self.session.get_outputs()[0].shape[1]

    def forward(self, images: Tensor) -> Tensor:
        images, logits = images.contiguous(), torch.empty(len(images), self.classes)
        self.binding.bind_input("images", "cpu", 0, np.float32, images.shape, images.data_ptr())
        self.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.data_ptr())
        self.session.run_with_iobinding(self.binding)
        return logits
