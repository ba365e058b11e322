"""Mistakes in params.yaml and on the command line: one sentence that names the parameter."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import legr
from experiments.config import workspace

PROJECT = Path(__file__).parent.parent
NAME = "cifar10-resnet56"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a copy of params.yaml to spoil; also the current folder."""
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    shutil.copytree(PROJECT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("kernel-*"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("scale", ["demo", "laptop", "paper"])
def test_every_scale_is_valid(project, scale):
    space = workspace(scale, NAME)
    assert space.results == project / "results" / scale / NAME
    assert len(space.networks) == 10


def test_paper_scale_is_the_papers_protocol(project):
    settings = workspace("paper", NAME).settings
    recipe = settings.baseline.recipe
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.gamma, recipe.milestones) == (
        200, 128, 0.1, 0.2, (0.3, 0.6, 0.8),
    )  # fmt: skip
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
    assert (settings.finetune.recipe.epochs, settings.finetune.recipe.lr) == (400, 0.01)
    assert len(settings.finetune.seeds) == 3
    algorithm = settings.search.algorithm
    assert (algorithm.population, algorithm.evaluations, algorithm.sample, settings.search.flops) == (64, 400, 16, 0.47)


def test_overrides_change_one_setting(project):
    space = workspace("demo", NAME, "playground", {"finetune.recipe.epochs": 7})
    assert space.settings.finetune.recipe.epochs == 7
    assert space.results == project / "playground" / "demo" / NAME
    assert space.checkpoints == project / "playground" / "checkpoints" / "demo" / NAME


MISTAKES = [
    ("data.name", "cifar11", r"data\.name is 'cifar11'.*'digits', 'cifar10', 'imagenette', 'imagenet' or 'folder'"),
    ("data.holdout", 0, r"data\.holdout is 0.*greater than 0"),
    ("data.holdut", 5, r"data\.holdut is not a known setting of demo\.cifar10-resnet56\.data; did you mean holdout\?$"),
    (
        "baseline.restart",
        {"epoch": 3, "epochs": 3, "lr": 1},
        r"restart\.epoch is not a known .*; did you mean epochs\?$",
    ),
    ("serach", {}, r"serach is not a known setting of demo\.cifar10-resnet56; did you mean search\?$"),
    ("latency.gpu", 1, r"latency\.gpu is not a known setting of demo\.cifar10-resnet56\.latency$"),
    ("model", "resnet57", r"model is 'resnet57'; it must be one of resnet56, mobilenet_v2"),
    ("compute.precision", "float8", r"precision is 'float8'"),
    ("baseline.recipe.epochs", -1, r"baseline\.recipe\.epochs is -1.*greater than 0"),
    ("baseline.recipe.epochs", "many", r"baseline\.recipe\.epochs is 'many'"),
    ("baseline.recipe.lr", 0, r"lr is 0"),
    ("baseline.recipe.schedule", "cosine", r"schedule is 'cosine'.*'step' or 'onecycle'"),
    ("search.flops", 1.5, r"search\.flops is 1\.5.*less than or equal to 1"),
    ("search.flops", 0, r"search\.flops is 0.*greater than 0"),
    ("search.algorithm.evaluations", 3, r"evaluations is 3; it must be at least population \(12\)"),
    ("search.rankings.legr", "magic", r"rankings\.legr is 'magic'.*'loss', 'recalibrated' or 'steps'"),
    ("finetune.seeds", [], r"finetune\.seeds is"),
    ("prediction.rankings", 1, r"prediction\.rankings is 1"),
]


@pytest.mark.parametrize(("name", "value", "message"), MISTAKES)
def test_a_mistake_is_one_sentence_that_names_the_parameter(project, name, value, message):
    def put(params):
        *path, last = name.split(".")
        section = params["demo"][NAME]
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value

    spoilt(project, put)
    with pytest.raises(legr.UserError, match=message) as error:
        workspace("demo", NAME)
    assert "\n" not in str(error.value)


def test_overrides_leave_the_prepared_images_alone(project):
    with pytest.raises(legr.UserError, match=r"overrides has 'data\.holdout'"):
        workspace("demo", NAME, None, {"data.holdout": 5})


def spoilt(project, change):
    params = yaml.safe_load((project / "params.yaml").read_text())
    change(params)
    (project / "params.yaml").write_text(yaml.safe_dump(params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p["experiments"][NAME]["plain"].append("magnitude"),
            "method is 'magnitude'; here it must be one of",
        ),
        (
            lambda p: p["experiments"][NAME]["learned"].append("legr-tau9"),
            "method is 'legr-tau9'; here it must be one of",
        ),
        (
            lambda p: p["demo"][NAME]["search"]["rankings"].update({"legr-steps": "steps"}),
            "method is 'legr-steps'; here it must be one of legr, legr-tau0",
        ),
        (lambda p: p["experiments"][NAME]["targets"].append(47), r"targets\.3 is 47"),
        (lambda p: p["experiments"][NAME]["targets"].append(47.0), r"targets\.3 is 47\.0.*less than or equal to 1"),
        (lambda p: p["experiments"][NAME]["targets"].append(1), r"targets\.3 is 1; .*with a decimal point"),
        (lambda p: p["demo"][NAME].pop("search"), "search is missing"),
        (lambda p: p.pop("experiments"), "params.yaml can't be read"),
        (lambda p: p["demo"].pop(NAME), "experiment is 'cifar10-resnet56'"),
    ],
)
def test_a_spoilt_file_is_one_sentence(project, change, message):
    spoilt(project, change)
    with pytest.raises(legr.UserError, match=message):
        workspace("demo", NAME)


def test_outside_of_the_project_it_says_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(legr.UserError, match="params.yaml was not found"):
        workspace("demo", NAME)


def cli(*arguments):
    return subprocess.run([sys.executable, "-m", "experiments", *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["data", "--scale", "desktop", "--experiment", NAME],
            "scale is 'desktop'; it must be one of demo, laptop, paper",
        ),
        (["data", "--scale", "demo", "--experiment", "mnist"], "experiment is 'mnist'"),
        (["6_dream", "--scale", "demo", "--experiment", NAME], "invalid choice: '6_dream'"),
        (["1_baseline", "--scale", "demo", "--experiment", NAME], "run the data stage"),
        (["3_prune", "--scale", "demo", "--experiment", NAME, "--set", "method"], "--set is 'method'"),
        (
            ["3_prune", "--scale", "demo", "--experiment", NAME, "--set", "metod=norm"],
            "--set names 'metod'; notebook 3_prune has the parameters scale, experiment, results",
        ),
    ],
)
def test_the_command_line_ends_with_one_sentence(project, arguments, message):
    result = cli(*arguments)
    assert result.returncode != 0
    assert message in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (project / "results").exists()


def test_a_missing_folder_leaves_nothing(project):
    spoilt(project, lambda p: p["laptop"][NAME]["data"].update(folder=str(project / "nowhere")))
    result = cli("data", "--scale", "laptop", "--experiment", NAME)
    assert result.returncode != 0
    assert f"data folder {project / 'nowhere'} does not exist" in result.stderr
    assert not list((project / "data").glob("**/*.safetensors*")) if (project / "data").exists() else True
