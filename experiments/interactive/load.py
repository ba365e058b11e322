"""Load the networks that lie beside this file. It needs torch, torchvision and safetensors.

In a program: `from load import load`, then `network, about = load("norm-0.5")`. Run as a script, it compares the logits
of each network with those in check.safetensors, which were computed before it was saved.
"""

import json
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file

FOLDER = Path(__file__).parent


def build(architecture, classes):
    """The dense network, with any weights. For a network that is not torchvision's, change this line."""
    return torchvision.models.get_model(architecture, num_classes=classes)


def load(name):
    """The network in eval mode; what its JSON file says: architecture, inputs, normalization, classes, widths."""
    about = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    network = build(about["architecture"], len(about["classes"]))
    for key, tensor in load_file(FOLDER / f"{name}.safetensors").items():
        path, _, attribute = key.rpartition(".")
        module = network.get_submodule(path)
        if isinstance(module, torch.nn.Conv2d) and module.groups == module.in_channels == module.out_channels:
            module.groups = len(tensor)  # depthwise: as many groups as filters are left
        trained = isinstance(getattr(module, attribute), torch.nn.Parameter)
        setattr(module, attribute, torch.nn.Parameter(tensor) if trained else tensor)
    return network.eval(), about


@torch.inference_mode()
def difference(name):
    """The largest difference between the logits now and when the network was saved."""
    check = load_file(FOLDER / "check.safetensors")
    return (load(name)[0](check["inputs"]) - check[name]).abs().max().item()


if __name__ == "__main__":
    for name in sorted(load_file(FOLDER / "check.safetensors").keys() - {"inputs"}):
        print(f"{name}: logits differ by at most {difference(name):.0e}")
