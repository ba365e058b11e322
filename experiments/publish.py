"""Networks as files that are read without this package: safetensors, JSON and ONNX, and load.py beside them."""

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments import load
from legr.files import UserError, atomic, write_json

TOLERANCE = 1e-3  # of the largest logit, or of 1: another runtime sums in another order

# Run by another Python, in the folder of the networks.
PROBE = """
import json, sys
from load import difference
found = {name: difference(name) for name in sys.argv[1:]}
packages = {name.partition(".")[0] for name in sys.modules}
print(json.dumps([found, sorted(packages & {"legr", "experiments"})]))
"""


def classifier(architecture: str, classes: int, pretrained: bool = False) -> nn.Module:
    """A network for so many classes, as load.py builds it.

    With `pretrained` it has torchvision's weights for ImageNet, except where their shape depends on the classes.
    """
    try:
        model = load.build(architecture, classes)
        if pretrained:
            own, weights = model.state_dict(), torchvision.models.get_model_weights(architecture).DEFAULT
            state = weights.get_state_dict(check_hash=True)
            fits = {name: t for name, t in state.items() if name in own and own[name].shape == t.shape}
            model.load_state_dict(fits, strict=False)
    except (ValueError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"architecture is {architecture!r}, pretrained is {pretrained}: {reason}") from None
    return model


def write(network: nn.Module, about: dict[str, Any], inputs: Tensor, stem: Path) -> list[Path]:
    """Write `stem`.safetensors, `stem`.json and `stem`.onnx: all three or none.

    Args:
        network: in eval mode, on the CPU.
        about: what goes into the JSON file beside the widths of all convolutions.
        inputs: [N, C, H, W], an example; the ONNX file takes any N.
    """
    widths = {path: m.out_channels for path, m in network.named_modules() if isinstance(m, nn.Conv2d)}
    paths = [stem.with_name(f"{stem.name}.{suffix}") for suffix in ("safetensors", "json", "onnx")]
    with contextlib.ExitStack() as files:
        weights, note, onnx = (files.enter_context(atomic(path)) for path in paths)
        save_file(network.state_dict(), weights)
        write_json(note, about | {"widths": widths})
        batch = ({0: torch.export.Dim("batch")},)
        torch.onnx.export(network, (inputs,), onnx, dynamic_shapes=batch, external_data=False, verbose=False)
    return paths


def save(networks: Mapping[str, nn.Module], about: Mapping[str, dict[str, Any]], inputs: Tensor, folder: Path) -> None:
    """`write` every network by its name, and check.safetensors and load.py beside them.

    Args:
        about: for each network, what goes into its JSON file.
        inputs: [N, C, H, W] for check.safetensors, with the logits that each network gives for them.
    """
    inputs, logits = inputs.cpu().contiguous(), {}
    for name, network in networks.items():
        network = network.cpu().eval().to(memory_format=torch.contiguous_format)
        with torch.inference_mode():
            logits[name] = network(inputs)
        write(network, about[name], inputs, folder / name)
    with atomic(folder / "check.safetensors") as path:
        save_file({"inputs": inputs, **logits}, path)
    shutil.copy(load.__file__, folder / "load.py")


def read_back(names: list[str], folder: Path) -> pd.DataFrame:
    """The largest difference of logits from those in check.safetensors: by load.py in another process, by ONNX Runtime.

    Raises:
        UserError: what was read is another network.
    """
    probe = subprocess.run([sys.executable, "-c", PROBE, *names], cwd=folder, capture_output=True, text=True)
    if probe.returncode:
        raise UserError(f"{folder}/load.py failed: {probe.stderr.strip().splitlines()[-1]}")
    differences, imported = json.loads(probe.stdout.splitlines()[-1])
    if imported:
        raise UserError(f"{folder}/load.py imported {', '.join(imported)}; it must do without")
    table = pd.DataFrame({"load.py": differences, "ONNX Runtime": {name: _by_onnx(folder, name) for name in names}})
    logits = load_file(folder / "check.safetensors")
    for name, row in table.iterrows():
        wrong = row[~(row <= TOLERANCE * max(logits[name].abs().max().item(), 1))]  # NaN, too
        for how, most in wrong.items():
            raise UserError(f"{name} in {folder}, read back by {how}, gives logits that differ by {most:.2g}")
    return table.rename_axis("network")


def _by_onnx(folder: Path, name: str) -> float:
    import onnxruntime  # takes a while; only who reads back needs it

    check = load_file(folder / "check.safetensors")
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: check["inputs"].numpy()})
    return (torch.from_numpy(logits) - check[name]).abs().max().item()
