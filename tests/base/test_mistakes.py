"""Mistakes that people make: each is one sentence that names the parameter or file, and nothing is written."""

import json
import re
import shutil
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import legr
from experiments.__main__ import main
from experiments.experiment import open_experiment
from tests.conftest import NAME, PROJECT, change, contents
from tests.pipeline.test_work import plant


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with params.yaml and a small tree of images in photos/; also the current folder."""
    folder = tmp_path / "project"
    for path in (f"{split}/{name}/{i}.png" for split in ("train", "test") for name in ("cat", "dog") for i in range(3)):
        (folder / "photos" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 32)).save(folder / "photos" / path)
    shutil.copy(PROJECT / "params.yaml", folder)
    monkeypatch.chdir(folder)
    for name in ("CIFAR10", "FOLDER", "DIGITS"):
        monkeypatch.delenv(f"LEGR_{name}", raising=False)
    return folder


def edit(name, value):
    """Change one setting of the demo's first experiment; a path from the top where it starts with a slash."""

    def both(params):
        *path, last = name[1:].split("/") if name[0] == "/" else ["demo", NAME, *name.split(".")]
        for key in path:
            params = params[int(key) if isinstance(params, list) else key]
        params[last] = value

    return lambda folder: change(folder, both)


def photos(spoil=lambda root: None, **settings):
    """The experiment reads photos/, which `spoil` changes."""
    data = edit("data", {"name": "folder", "folder": "photos", "holdout": 2} | settings)
    return lambda folder: (data(folder), spoil(folder / "photos"))


def text(content):
    return lambda folder: (folder / "params.yaml").write_text(content)


RECIPE = "dense.recipes.0"
SETTINGS = {  # what was done: the change, and what the sentence says
    "no params.yaml": (lambda f: (f / "params.yaml").unlink(), "params.yaml"),
    "not YAML": (text("demo: [1, 2"), "params.yaml can't be read: while parsing"),
    "negative epochs": (edit(f"{RECIPE}.epochs", -3), r"recipes\.0\.epochs is -3"),
    "a misspelt key": (edit(f"{RECIPE}.epoch", 3), r"recipes\.0\.epoch is 3"),
    "no such network": (edit("model", "resnet57"), "model is 'resnet57'"),
    "too few evaluations": (edit("rankings.legr.search.evaluations", 3), "evaluations is 3"),
    "neither weights nor recipes": (edit("dense", {}), "dense.*: it must have weights to start from, recipes"),
    "no such setting to vary": (edit("ablations.vary", {"fitness.step": [1]}), r"vary has fitness\.step: 1"),
    "nothing to vary": (edit("ablations.search", None), "vary changes one setting at a time of search, which is not"),
    "no such method": (edit("/methods/plain", ["random"]), "method is 'random'"),
    "a method without its ranking": (edit("rankings", {"legr": {"targets": [0.5]}}), "rankings lacks legr-ours"),
    "all held out": (edit("data.holdout", 5000), "holdout is 5000; it must be between 1 and 1197"),
    "no folder": (edit("data", {"name": "folder", "holdout": 2}), r"data\.folder is missing"),
    "another side than CIFAR-10's": (photos(name="cifar10", folder=None, resolution=16), "resolution is 16; cifar10"),
}
FOLDERS = {
    "a folder that is not there": (photos(folder="nowhere"), "data folder nowhere/train can't be used"),
    "no test images": (photos(lambda r: shutil.rmtree(r / "test")), r"photos/test can't be used .*must hold train/"),
    "a class in one split": (photos(lambda r: shutil.rmtree(r / "test/dog")), "classes in only one .*: dog"),
    "a class without images": (photos(lambda r: [p.unlink() for p in r.glob("test/dog/*")]), "it has no image of dog"),
    "only loose images": (
        photos(lambda r: (shutil.rmtree(r / "train"), shutil.copytree(r / "test/cat", r / "train"))),
        "it has no folder of a class",
    ),
    "a class that is held out whole": (
        photos(lambda r: [p.unlink() for p in r.glob("train/dog/[12].png")], holdout=3),
        "holdout is 3; it leaves no image to train on of dog",
    ),
    "a link to nothing": (photos(lambda r: (r / "train/cat/9.png").symlink_to("nowhere")), "can't be used .*9.png"),
    "text for an image": (photos(lambda r: (r / "train/cat/0.png").write_text("meow")), r"image .*cat/0\.png can't be"),
}


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["experiments", *arguments])
    try:
        code = main()
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.parametrize(("spoil", "message"), (SETTINGS | FOLDERS).values(), ids=SETTINGS | FOLDERS)
def test_in_settings_and_images(project, monkeypatch, capsys, spoil, message):
    spoil(project)
    before = contents(project)
    code, (sentence,) = run(monkeypatch, capsys, "data", "demo", NAME)
    assert code == 1 and sentence.startswith("error: ") and re.search(message, sentence)
    assert contents(project) == before


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ("data large cifar10-resnet56", 1, "scale is 'large'"),
        ("data demo resnet", 1, "experiment is 'resnet'"),
        ("data demo", 2, "experiment"),
        ("date demo cifar10-resnet56", 2, "stage is 'date'"),
        ("sets demo cifar10-resnet56", 1, "stage is 'sets'"),
        ("compare/legr demo cifar10-resnet56", 1, "stage is 'compare/legr'"),
        ("report demo cifar10-resnet56", 1, "has no executed notebooks"),
    ],
)
def test_on_the_command_line(project, any_code, monkeypatch, capsys, arguments, code, message):
    before = contents(project)
    ended, told = run(monkeypatch, capsys, *arguments.split())
    assert ended == code and message in told[-1] and contents(project) == before


def test_on_windows(project, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    code, (sentence,) = run(monkeypatch, capsys, "data", "demo", NAME)
    assert code == 1 and sentence.endswith("on Windows it needs WSL, start it there")


@pytest.mark.parametrize("key", ["finetune.recipe.epoch", "model.depth", "dense.recipes.first", "data.holdout"])
def test_in_overrides(project, key):
    with pytest.raises(legr.UserError, match=key.split(".")[0]):
        open_experiment("demo", NAME, "dense", overrides={key: 3})


def ranking(spoil):
    return lambda _, path: path.write_text(spoil({"scale": [1.0] * 55, "shift": [0.0] * 55}))


def weights(spoil):
    def both(path, _):
        tensors = load_file(path)
        spoil(tensors)
        save_file(tensors, path)

    return both


FILES = {
    "half a ranking": (ranking(lambda v: json.dumps(v)[:99]), r"not a JSON file \(.*\); it should hold the ranking"),
    "no ranking": (lambda _, r: r.unlink(), r"ranking-0\.json does not exist; it holds the ranking; learn it first"),
    "no classifier": (weights(lambda t: t.pop("linear.weight")), r"network\.safetensors is not the dense network's"),
    "no weights": (lambda d, _: d.unlink(), r"network\.safetensors .*No such file.*the stage that makes it"),
}


@pytest.mark.parametrize(("spoil", "message"), FILES.values(), ids=FILES)
def test_in_files_of_earlier_stages(tmp_path, any_code, spoil, message):
    results = plant(tmp_path) / "results" / "demo" / NAME
    legr.Ranking.norm_only(55).save(results / "rankings/legr/ranking-0.json")
    spoil(results / "dense/network.safetensors", results / "rankings/legr/ranking-0.json")
    before = contents(tmp_path)
    with pytest.raises(legr.UserError, match=message) as error:
        open_experiment("demo", NAME, "sets/legr", "results", root=tmp_path).select("legr", 0.5)
    assert "\n" not in str(error.value) and contents(tmp_path) == before
