"""Networks as files that are read without this package: safetensors, JSON and ONNX, and load.py beside them."""

import contextlib
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from experiments.interactive import load
from legr.files import UserError, atomic, write_json


def classifier(architecture: str, classes: int, pretrained: bool = False) -> nn.Module:
    """A network for so many classes, as load.py builds it.

    With `pretrained` it has torchvision's weights for ImageNet, except where their shape depends on the classes.
    """
    try:
        model = load.build(architecture, classes)
        if pretrained:
            needed, weights = model.state_dict(), torchvision.models.get_model_weights(architecture).DEFAULT
            state = weights.get_state_dict(check_hash=True)
            fits = {name: t for name, t in state.items() if name in needed and needed[name].shape == t.shape}
            model.load_state_dict(fits, strict=False)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"architecture is {architecture!r}, pretrained is {pretrained}: {reason}") from None
    return model


def write(network: nn.Module, about: dict[str, Any], inputs: Tensor | None, stem: Path) -> list[Path]:
    """Write `stem`.safetensors, `stem`.json and `stem`.onnx: all or none.

    Args:
        network: in eval mode, on the CPU.
        about: what goes into the JSON file beside the widths of all convolutions.
        inputs: [N, C, H, W], an example for the ONNX file, which takes any N; None leaves that file out.
    """
    widths = {path: m.out_channels for path, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    suffixes = ("safetensors", "json") if inputs is None else ("safetensors", "json", "onnx")
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in suffixes]
    with contextlib.ExitStack() as files:
        weights, note, *onnx = (files.enter_context(atomic(path)) for path in paths)
        save_file(network.state_dict(), weights)
        write_json(note, about | {"widths": widths})
        if inputs is not None:
            batch = ({0: torch.export.Dim("batch")},)
            torch.onnx.export(network, (inputs,), *onnx, dynamic_shapes=batch, external_data=False, verbose=False)
    return paths


def save(
    networks: Mapping[str, nn.Module],
    about: Mapping[str, dict[str, Any]],
    inputs: Tensor,
    folder: Path,
    onnx: Collection[str],
) -> None:
    """`write` every network by its name, and check.safetensors and load.py beside them.

    Args:
        about: for each network, what goes into its JSON file.
        inputs: [N, C, H, W] for check.safetensors, with the logits that each network gives for them.
        onnx: names of those that are written for other runtimes, too, which takes a while.
    """
    inputs, logits = inputs.cpu().contiguous(), {}
    for name, network in networks.items():
        network = network.cpu().eval().to(memory_format=torch.contiguous_format)
        with torch.inference_mode():
            logits[name] = network(inputs)
        write(network, about[name], inputs if name in onnx else None, folder / name)
    with atomic(folder / "check.safetensors") as path:
        save_file({"inputs": inputs, **logits}, path)
    shutil.copy(load.__file__, folder / "load.py")
