"""Where networks are computed, and in which precision."""

import warnings
from typing import Literal

import torch

from legr.files import Settings, UserError


class Compute(Settings):
    """Where and in which precision: `auto` takes a GPU, and bfloat16 where the processor has it.

    `graphs`: on CUDA, training steps are recorded once and replayed (see `legr.training.Step`); the result is the same.
    """

    device: str = "auto"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    graphs: bool = True

    def resolve(self) -> "Compute":
        """The same with `auto` replaced by what this machine has."""
        device, precision = self.device, self.precision
        if device == "auto":
            device = "cuda" if torch.cuda.device_count() else "cpu"
        allowed = "auto, cpu, or cuda with a GPU"
        if device.partition(":")[0] not in ("cpu", "cuda"):
            raise UserError(f"device is {device!r}; it must be {allowed}")
        try:
            torch.ones(1, device=device).add(1).item()  # a kernel: a driver or card may be too old for this PyTorch
        except (RuntimeError, AssertionError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            if self.device != "auto":
                raise UserError(f"device is {device!r}; this machine can't use it ({allowed}): {reason}") from None
            warnings.warn(f"this machine's GPU can't be used, so the CPU is: {reason}", stacklevel=2)
            device = "cpu"
        if precision == "auto":
            gpu = device.startswith("cuda")  # of NVIDIA's, those before 8.0 emulate it
            fast = torch.cuda.get_device_capability(device) >= (8, 0) if gpu else torch.cpu._is_avx512_bf16_supported()
            precision = "bfloat16" if fast else "float32"
        return self.model_copy(update={"device": device, "precision": precision})

    def autocast(self) -> torch.autocast:
        torch.backends.cudnn.deterministic = True  # here, as all computing passes; a GPU may else vary from run to run
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bfloat16")
