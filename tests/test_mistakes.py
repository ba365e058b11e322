"""Forty and more mistakes that people make: each is one sentence, a non-zero exit, and nothing written."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from experiments.__main__ import main
from experiments.datasets import CIFAR10_CLASSES
from legr import models
from legr.errors import UserError
from tests.conftest import NAME, PHOTOS, PROJECT

WNIDS = ("n01440764", "n02102040")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with params.yaml and the notebooks, and a small tree of images in photos/; the current folder."""
    folder = tmp_path / "project"
    folder.mkdir()
    shutil.copy(PROJECT / "params.yaml", folder)
    shutil.copytree(PROJECT / "notebooks", folder / "notebooks")
    images(folder / "photos", ("cat", "dog"))
    monkeypatch.chdir(folder)
    for name in ("LEGR_CIFAR10", "LEGR_IMAGENETTE", "LEGR_IMAGENET", "LEGR_STATE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def images(folder, classes, count=3):
    for split in ("train", "test"):
        for number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 32), (50 * number, 20 * i, 0)).save(folder / split / name / f"{i}.png")


def edit(name, value):
    """Change one setting of the demo's first experiment; a path from the top where it starts with a slash."""

    def change(folder):
        params = yaml.safe_load((folder / "params.yaml").read_text())
        path = name[1:].split("/") if name[0] == "/" else ["demo", NAME, *name.split(".")]
        section = params
        for key in path[:-1]:
            section = section.setdefault(key, {})
        section[path[-1]] = value
        (folder / "params.yaml").write_text(yaml.safe_dump(params))

    return change


def photos(change=lambda folder: None, **settings):
    """The experiment reads photos/, which `change` spoils."""

    def both(folder):
        edit("data", {"name": "folder", "folder": "photos", "holdout": 2} | settings)(folder)
        change(folder / "photos")

    return both


def text(content):
    return lambda folder: (folder / "params.yaml").write_text(content)


def on_tree(*steps):
    def change(root):
        for step in steps:
            step(root)

    return change


def huge(path):
    """A PNG of a few hundred bytes whose header promises 30,000 by 30,000 pixels."""
    Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    import zlib

    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    path.write_bytes(content)


RECIPE = "baseline.recipe"
PARAMS = [
    ("no params.yaml", lambda f: (f / "params.yaml").unlink(), "params.yaml was not found in"),
    ("not YAML", text("demo: [1, 2"), "params.yaml can't be read: while parsing"),
    ("a list", text("- 1\n"), "params.yaml can't be read"),
    ("empty", text(""), "params.yaml can't be read"),
    ("without experiments", text("demo: {}\n"), "params.yaml can't be read: 'experiments'"),
    ("a scale that is a word", edit("/demo", "fast"), "experiment is 'cifar10-resnet56'; scale demo has"),
    ("negative epochs", edit(f"{RECIPE}.epochs", -3), "epochs is -3; input should be greater than 0"),
    ("half an epoch", edit(f"{RECIPE}.epochs", 0.5), "epochs is 0.5; input should be a valid integer"),
    ("epochs in words", edit(f"{RECIPE}.epochs", "ten"), "epochs is 'ten'"),
    ("a rate of zero", edit(f"{RECIPE}.lr", 0), "lr is 0"),
    ("a rate with a comma", edit(f"{RECIPE}.lr", "0,1"), "lr is '0,1'"),
    ("an infinite rate", edit(f"{RECIPE}.lr", float("inf")), "lr is inf"),
    ("momentum above one", edit(f"{RECIPE}.momentum", 9), "momentum is 9"),
    ("no batch", edit(f"{RECIPE}.batch_size", 0), "batch_size is 0"),
    ("a schedule there is not", edit(f"{RECIPE}.schedule", "cosine"), "schedule is 'cosine'"),
    ("milestones in epochs", edit(f"{RECIPE}.milestones", [60, 120]), "milestones.0 is 60"),
    ("a misspelt key", edit(f"{RECIPE}.epoch", 3), r"epoch is not a known setting .*; did you mean epochs\?"),
    ("a misspelt section", edit("serach", {}), r"serach is not a known setting .*; did you mean search\?"),
    ("an unknown setting like no other", edit("latency.gpu", 1), r"latency.gpu is not a known setting of [a-z0-9.-]*$"),
    (
        "a misspelt key of an optional section",
        edit("baseline.restart", {"epoch": 3, "epochs": 3, "lr": 1}),
        r"restart.epoch is not a known .*; did you mean epochs\?$",
    ),
    ("a section that is a number", edit("search", 5), "search is 5"),
    ("a missing section", edit("finetune", None), "finetune is None"),
    ("no such network", edit("model", "resnet57"), "model is 'resnet57'; it must be one of resnet56"),
    ("no such data", edit("data.name", "cifar11"), "data.name is 'cifar11'"),
    ("no such precision", edit("compute.precision", "fp8"), "precision is 'fp8'"),
    ("no threads", edit("compute.threads", 0), "threads is 0"),
    ("percent for a fraction", edit("search.flops", 47), "search.flops is 47"),
    ("nothing left", edit("search.flops", 0), "search.flops is 0"),
    ("too few evaluations", edit("search.algorithm.evaluations", 3), "evaluations is 3; it must be at least popu"),
    ("too many in flight", edit("search.algorithm.in_flight", 13), "in_flight is 13; it must be at most population"),
    ("certain racing", edit("search.algorithm.racing", 1), "racing is 1"),
    (
        "racing at several FLOP counts",
        edit("search.algorithm.restart", {"population": 2, "evaluations": 2, "racing": 0.1, "also_at": [0.7]}),
        "racing is 0.1; it must be 0 where also_at has further FLOP counts",
    ),
    ("idle workers", edit("search.workers", 4), "workers is 4; it must be at most in_flight"),
    ("no such fitness", edit("search.rankings.legr", "accuracy"), "rankings.legr is 'accuracy'"),
    ("no such ranking", edit("search.rankings.mine", "loss"), "method is 'mine'; here it must be one of"),
    ("no such method", edit(f"/experiments/{NAME}/plain", ["random"]), "method is 'random'; here it must be"),
    ("no such learned ranking", edit(f"/experiments/{NAME}/learned", ["legr-tau9"]), "method is 'legr-tau9'; here it"),
    ("one ranking to compare", edit("prediction.rankings", 1), "prediction.rankings is 1"),
    ("a target in percent", edit(f"/experiments/{NAME}/targets", [47.0]), "targets.0 is 47.0"),
    ("a target without a point", edit(f"/experiments/{NAME}/targets", [1]), "targets.0 is 1; files are named after it"),
    ("no seeds", edit("finetune.seeds", []), "finetune.seeds is"),
    ("a negative seed", edit("finetune.seeds", [-1]), "finetune.seeds.0 is -1"),
    ("a network too large for the images", edit("data.resolution", 3), "resolution is 3; resnet56 needs at least 4"),
    ("nothing held out", edit("data.holdout", 0), "holdout is 0"),
    ("all held out", edit("data.holdout", 5000), "holdout is 5000; it must be between 1 and 1436"),
]
TREES = [
    ("no folder", edit("data", {"name": "folder", "holdout": 2}), "data.folder is missing; data.name 'folder' needs"),
    ("a folder that is not there", photos(folder="nowhere"), "data folder nowhere does not exist"),
    ("a folder that is a file", photos(folder="params.yaml"), "data folder params.yaml does not exist"),
    ("no test images", photos(lambda r: shutil.rmtree(r / "test")), "photos/test does not exist"),
    ("an empty class", photos(lambda r: (r / "train" / "eel").mkdir()), "photos/train is not usable: Found no valid"),
    ("no classes", photos(lambda r: [shutil.rmtree(p) for p in r.glob("train/*")]), "photos/train is not usable"),
    ("a class in one split", photos(lambda r: shutil.rmtree(r / "test" / "dog")), "classes in only one .*: dog"),
    ("an empty image", photos(lambda r: (r / "train/cat/0.png").write_bytes(b"")), "1 unreadable images.*cat/0.png"),
    (
        "an image that breaks off",
        photos(lambda r: (r / "test/dog/1.png").write_bytes((r / "test/dog/0.png").read_bytes()[:60])),
        "1 unreadable images.*dog/1.png",
    ),
    (
        "two that are text",
        photos(lambda r: [(r / f"train/dog/{i}.png").write_text("meow") for i in (0, 2)]),
        "2 unreadable images, the first of them: .*dog/0.png",
    ),
    (
        "a huge image",
        photos(lambda r: huge(r / "train/cat/1.png")),
        "1 unreadable images.*cat/1.png.*DecompressionBomb",
    ),
    ("a loop of links", photos(lambda r: (r / "train/cat/all").symlink_to(r)), "cat/all is a link to a folder that it"),
    ("a link to itself", photos(lambda r: (r / "train/cat/x.png").symlink_to("x.png")), "1 unreadable images.*x.png"),
    ("far too large", photos(resolution=2_000_000), "has 6 images, .* GiB of memory are free: set data.stream"),
    ("not ImageNet's names", photos(name="imagenette"), "class folder 'cat' is not a WordNet id"),
    (
        "an id that is none of the 1,000",
        photos(on_tree(shutil.rmtree, lambda r: images(r, ("n01440764", "n99999999"))), name="imagenet"),
        "class folder 'n99999999' is not one of ImageNet's 1,000 classes",
    ),
    ("other classes than CIFAR-10's", photos(name="cifar10"), "has classes cat, dog; CIFAR-10 has airplane"),
    (
        "a part of CIFAR-10",
        photos(on_tree(shutil.rmtree, lambda r: images(r, CIFAR10_CLASSES)), name="cifar10"),
        "30 training and 30 test images; CIFAR-10 has 50,000 and 10,000",
    ),
]


def files(folder):
    """Everything below `folder`, with what is in it."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def written(folder):
    """The same without what Python itself leaves, and without the empty folders of an interrupted stage's state."""
    return {k: v for k, v in files(folder).items() if "__pycache__" not in k and not k.startswith(".state")}


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err


@pytest.mark.parametrize(("change", "message"), [m[1:] for m in PARAMS + TREES], ids=[m[0] for m in PARAMS + TREES])
def test_in_settings_and_images(project, monkeypatch, capsys, change, message):
    change(project)
    before = files(project)
    code, told = run(monkeypatch, capsys, "data", "--scale", "demo", "--experiment", NAME)
    assert code == 1
    (sentence,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert told.rstrip().endswith(sentence)
    assert re.search(message, sentence)
    assert "Traceback" not in told
    assert files(project) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ("data", "--scale", "large", "--experiment", NAME),
            1,
            "scale is 'large'; it must be one of demo, laptop, paper",
        ),
        (("data", "--scale", "demo", "--experiment", "resnet"), 1, "experiment is 'resnet'; scale demo has cifar10"),
        (("data", "--experiment", NAME), 2, "the following arguments are required: --scale"),
        (("date", "--scale", "demo", "--experiment", NAME), 2, "argument stage: invalid choice: 'date'"),
        (("data", "--scale", "demo", "--experiment", NAME, "--sett", "a=1"), 2, "unrecognized arguments: --sett a=1"),
        (("2_ranking", "--scale", "demo", "--experiment", NAME, "--set", "method"), 1, "--set is 'method'; it must be"),
        (("2_ranking", "--scale", "demo", "--experiment", NAME, "--set", "methd=legr"), 1, "--set names 'methd'"),
    ],
)
def test_on_the_command_line(project, monkeypatch, capsys, arguments, code, message):
    before = files(project)
    ended, told = run(monkeypatch, capsys, *arguments)
    assert (ended, "Traceback" in told) == (code, False)
    assert message in told.splitlines()[-1]
    assert files(project) == before


def test_a_run_in_another_folder_leaves_the_results_alone(project, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("experiments.__main__.execute", lambda name, place, parameters: asked.append(place.results))
    run(monkeypatch, capsys, "2_ranking", "--scale", "demo", "--experiment", NAME, "--set", "results=playground")
    assert asked == [project / "playground" / "demo" / NAME]


def spoil_ranking(change):
    def spoil(results):
        path = results / "ranking.json"
        value = json.loads(path.read_text())
        path.write_text(change(value) if isinstance(change(value), str) else json.dumps(change(value)))

    return spoil


def spoil_weights(change):
    def spoil(results):
        path = results / "baseline.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return spoil


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


LONGER = {"scale": [1.0] * 56, "shift": [0.0] * 56}
FILES = [
    ("a layer too many", "3_prune", spoil_ranking(lambda v: LONGER), "ranking has 56 layers; this network has 55"),
    (
        "layers are missing",
        "3_prune",
        spoil_ranking(lambda v: {k: x[:50] for k, x in v.items()}),
        "ranking has 50 layers; this network has 55",
    ),
    (
        "a value that is none",
        "3_prune",
        spoil_ranking(lambda v: v | {"scale": [float("nan")] * 55}),
        "ranking scale has a value that is not a finite number",
    ),
    ("no keys", "3_prune", spoil_ranking(lambda v: v["scale"]), "is not a JSON object with the lists of numbers"),
    ("half a file", "3_prune", spoil_ranking(lambda v: json.dumps(v)[:99]), "is not a JSON object with the lists"),
    ("too large", "3_prune", spoil_ranking(lambda v: " " * 10_000_001), "10,000,001 bytes; a ranking has"),
    ("no ranking", "3_prune", lambda r: (r / "ranking.json").unlink(), "ranking.json does not exist; learn it first"),
    (
        "weights that are not numbers",
        "2_ranking",
        spoil_weights(lambda t: t["blocks.3.conv1.weight"].view(-1)[7:8].fill_(float("nan"))),
        "is spoilt: tensor 'blocks.3.conv1.weight' holds values that are not finite",
    ),
    (
        "weights of another shape",
        "2_ranking",
        spoil_weights(lambda t: t.update({"conv1.weight": torch.zeros(16, 1, 3, 3)})),
        r"belongs to another network: tensor 'conv1.weight' is \[16, 1, 3, 3\] there and must be \[16, 3, 3, 3\]",
    ),
    (
        "weights for other classes",
        "2_ranking",
        spoil_weights(lambda t: t.update({"linear.weight": torch.zeros(7, 64), "linear.bias": torch.zeros(7)})),
        r"tensor 'linear.bias' is \[7\] there and must be \[10\]",
    ),
    (
        "a tensor is missing",
        "2_ranking",
        spoil_weights(lambda t: t.pop("bn1.bias")),
        r"tensor 'bn1.bias' is absent there and must be \[16\]",
    ),
    (
        "half of the weights",
        "2_ranking",
        lambda r: os.truncate(r / "baseline.safetensors", 100_000),
        "weights file .* is not a whole safetensors file",
    ),
    (
        "a pickle",
        "2_ranking",
        lambda r: (r / "baseline.safetensors").write_bytes(pickle.dumps(Code())),
        "weights file .* is not a whole safetensors file",
    ),
    (
        "weights of a giant",
        "2_ranking",
        lambda r: os.truncate(r / "baseline.safetensors", 10**9),
        "weights file .* has 1,000,000,000 bytes; CifarResNet needs about",
    ),
    (
        "no weights",
        "2_ranking",
        lambda r: (r / "baseline.safetensors").unlink(),
        "weights file .* does not exist; run the stage that makes it",
    ),
    (
        "no images",
        "1_baseline",
        lambda r: (r.parents[2] / "data" / "demo" / f"{NAME}.safetensors").unlink(),
        r"data file .* does not exist; run the data stage \(dvc repro\) first",
    ),
    (
        "half of the images",
        "2_ranking",
        lambda r: os.truncate(r.parents[2] / "data" / "demo" / f"{NAME}.safetensors", 100_000),
        "data file .* is not whole",
    ),
]


@pytest.mark.slow
@pytest.mark.harness
@pytest.mark.parametrize(("notebook", "spoil", "message"), [m[1:] for m in FILES], ids=[m[0] for m in FILES])
def test_in_files(done, tmp_path, notebook, spoil, message):
    folder = tmp_path / "project"
    left_out = shutil.ignore_patterns(".dvc", "checkpoints", "__pycache__", "notebooks", PHOTOS, f"{PHOTOS}.*")
    shutil.copytree(done, folder, ignore=left_out)
    shutil.copytree(done / "notebooks", folder / "notebooks")
    results = folder / "results" / "demo" / NAME
    spoil(results)
    before = written(folder)
    method, target = ("--set", "method=legr"), ("--set", "target=0.5")
    parameters = {"1_baseline": (), "2_ranking": method, "3_prune": method + target}[notebook]
    command = [sys.executable, "-m", "experiments", notebook, "--scale", "demo", "--experiment", NAME, *parameters]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert re.search(message, last)
    assert "Traceback" not in ended.stderr
    assert not (folder / "ran").exists()
    assert written(folder) == before


@pytest.mark.parametrize("size", [0, 10, 5_000])
def test_half_of_an_archive_is_one_sentence(tmp_path, size):
    """What torch.save writes is a zip file."""
    model = models.build("resnet56", 10, 0)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    os.truncate(tmp_path / "weights.pth", size)
    with pytest.raises(UserError, match=r"weights file .*weights\.pth is not a whole state dict") as error:
        models.load_weights(model, tmp_path / "weights.pth")
    assert "\n" not in str(error.value)
