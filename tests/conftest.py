"""Small networks and data that most tests share. Everything runs in float32 on one thread count."""

import copy
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
import yaml
from torch import nn
from torch.nn import functional as F

import legr
from experiments import experiment
from legr.data import Augmentation, Dataset, Images, hold_out
from legr.models import CifarResNet
from legr.training import Compute

PROJECT = Path(__file__).parent.parent
NAME, PHOTOS = "cifar10-resnet56", "imagenet-mobilenetv2"
PIPELINE = ("legr", "experiments", "notebooks", "params.yaml", "dvc.yaml", ".dvcignore")


class Inverted(nn.Module):
    """MobileNetV2's ingredients in small: expansion, depthwise, projection, residual, flatten."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU6())
        depthwise = nn.Conv2d(24, 24, 3, 1, 1, groups=24, bias=False)
        self.depthwise = nn.Sequential(depthwise, nn.BatchNorm2d(24), nn.ReLU6())
        self.project = nn.Sequential(nn.Conv2d(24, 8, 1, bias=False), nn.BatchNorm2d(8))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.linear = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.project(self.depthwise(self.expand(x)))
        return self.linear(torch.flatten(self.pool(x), 1))


class Plain(nn.Module):
    """Biases, concatenation, max pooling, mean over height and width."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.left, self.right = nn.Conv2d(12, 10, 3, padding=1), nn.Conv2d(12, 6, 1)
        self.norm = nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 20, 3)
        self.linear = nn.Linear(20, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.relu(self.norm(torch.cat([self.left(x), self.right(x)], 1)))
        return self.linear(F.relu(self.last(x)).mean((2, 3)))


NETWORKS = {"resnet8": lambda: CifarResNet(1), "inverted": Inverted, "plain": Plain}


def settle(model: nn.Module) -> nn.Module:
    """Give BatchNorm statistics and affine parameters that are not their defaults."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 2, generator=generator)
            nn.init.normal_(module.bias, generator=generator)
    return model.eval()


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return settle(NETWORKS[request.param]())


@pytest.fixture(scope="session")
def traced():
    torch.manual_seed(0)
    model = settle(CifarResNet(1))
    return model, legr.trace(model, torch.zeros(1, 3, 32, 32))


@pytest.fixture
def small(traced):
    """A residual network with zero-pad shortcuts, which tests may change, and its graph."""
    torch.manual_seed(0)
    model, graph = traced
    return copy.deepcopy(model), graph


@pytest.fixture
def any_code(monkeypatch):
    """A project elsewhere, though the code that runs is this folder's."""
    monkeypatch.setattr(experiment, "check_code", lambda root: None)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """scikit-learn's handwritten digits, 8×8 grey enlarged to 32×32×3; every fifth is a test image."""
    bunch = sklearn.datasets.load_digits()
    grey = torch.tensor(bunch.images, dtype=torch.float32)[:, None] * (255 / 16)
    large = F.interpolate(grey, size=(32, 32), mode="bilinear").round().to(torch.uint8)
    every = Images(large.expand(-1, 3, -1, -1).contiguous(), torch.tensor(bunch.target), Augmentation(flip=False))
    test = torch.arange(len(every)) % 5 == 0
    train = every[~test]
    return Dataset("digits", list("0123456789"), train, hold_out(train.labels, 200, 0), every[test])


@pytest.fixture
def compute():
    return Compute(device="cpu", precision="float32").resolve()


def random_kept(graph: legr.Graph, seed: int, share: float = 0.5) -> list[torch.Tensor]:
    """Random masks that coupled filters share and that leave every layer a filter or more."""
    units = np.random.default_rng(seed).random(graph.unit_count) < share
    for own in graph.units:
        units[own[0]] = True
    return graph.masks(units)


def silenced(model: nn.Module, graph: legr.Graph, kept: list[torch.Tensor]) -> nn.Module:
    """`model`, changed in place: of dropped filters there is no output, nor anything left after BatchNorm."""
    units = graph.kept_units(kept)
    with torch.no_grad():
        for operation in graph.operations:
            if operation.module is not None:
                module = model.get_submodule(operation.module)
                gone = torch.from_numpy(~graph.kept_channels(units, operation.outputs))
                module.weight[gone] = 0
                if getattr(module, "bias", None) is not None:
                    module.bias[gone] = 0
    return model


def assert_same_gradients(small, masked, graph, kept, x, rounding=1e-4):
    """Of every parameter of a pruned network and of the masked one, beside the largest of all."""
    units, operations = graph.kept_units(kept), {o.module: o for o in graph.operations}
    for network in (small, masked):
        torch.manual_seed(0)
        out = network(x)
        (out * torch.arange(out.numel(), dtype=out.dtype).cos().view(out.shape)).sum().backward()
    largest = max(p.grad.abs().max().item() for p in small.parameters())
    for name, parameter in small.named_parameters():
        expected = masked.get_parameter(name).grad
        if operation := operations.get(name.rpartition(".")[0]):
            for dim, side in enumerate((operation.outputs, operation.inputs)[: expected.dim()]):
                stay = torch.from_numpy(graph.kept_channels(units, side).nonzero()[0])
                expected = expected.index_select(dim, stay)
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=rounding * largest)


def environment(folder):
    """For processes that run the folder's code, not that which is installed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(folder)}


def contents(folder):
    """Every file below `folder`, with what is in it; folders too."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def dvc(folder, *arguments, check=True):
    command = [sys.executable, "-m", "dvc", *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment(folder))
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result.stdout if check else result.stdout + result.stderr


def copy_project(folder, *names):
    """Files and folders of the project by their names, as a checkout has them."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (PROJECT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
            shutil.copytree(PROJECT / name, folder / name, ignore=ignored)
        else:
            shutil.copy(PROJECT / name, folder / name)


def change(folder, edit):
    params = yaml.safe_load((folder / "params.yaml").read_text())
    edit(params)
    (folder / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture(scope="session")
def done(tmp_path_factory):
    """A copy of the project in which the pipeline has run, shortened. Tests leave it as they found it."""
    folder = tmp_path_factory.mktemp("project")
    copy_project(folder, *PIPELINE)

    def shorten(params):
        params |= {"scale": "demo", "methods": {"learned": ["legr"], "plain": ["norm"]}}
        demo, target = params["demo"][NAME], 0.5
        demo["data"]["resolution"] = 8
        demo |= {"trials": 2, "targets": [target], "cuts": {"number": 4, "test_images": 64}}
        demo["dense"]["recipes"][0] |= {"epochs": 1, "batch_size": 64}
        search = {"population": 2, "evaluations": 4, "sample": 2}
        fitness = {"validation_images": 64, "recalibration_images": 64}
        demo["rankings"] = {"legr": {"targets": [target], "search": search, "fitness": fitness}}
        demo["finetune"]["recipe"] |= {"epochs": 1, "batch_size": 256}
        fitness = {"as pruned": {"validation_images": 64}, "after 1 step": {"validation_images": 64, "steps": 1}}
        demo["ablations"] |= {"targets": [target], "rankings": 4, "steps": 2, "fitness": fitness}
        demo["ablations"] |= {"search": {"targets": [target], "search": dict(search)}, "vary": {"fitness.steps": [1]}}
        demo["ablations"]["candidates"] = {"search": {"targets": [target], "search": dict(search)}}
        demo["latency"] = {"batches": [1, 4], "repetitions": 2}

    change(folder, shorten)
    # ResNet-56 alone: CI runs the whole demo by the README's commands.
    pipeline = yaml.safe_load((folder / "dvc.yaml").read_text())
    pipeline["vars"][0]["names"], report = [NAME], pipeline["stages"]["report"]
    report |= {"cmd": report["cmd"].replace(PHOTOS, ""), "deps": [d for d in report["deps"] if PHOTOS not in d]}
    pipeline |= {part: [path for path in pipeline[part] if PHOTOS not in path] for part in ("metrics", "plots")}
    (folder / "dvc.yaml").write_text(yaml.safe_dump(pipeline, sort_keys=False))
    dvc(folder, "init", "--no-scm", "--quiet")
    dvc(folder, "repro")
    return folder
