"""params.yaml: what its scales say, overrides, and folders to play in. Mistakes are in test_mistakes.py."""

import shutil

import pytest
import yaml

import legr
from experiments.experiment import open_experiment
from experiments.methods import METHODS
from tests.conftest import NAME, PHOTOS, PROJECT, change

SCALES = yaml.safe_load((PROJECT / "params.yaml").read_text())


@pytest.fixture
def project(tmp_path, monkeypatch, any_code):
    """A folder with a copy of params.yaml; the current folder is one in it."""
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    return tmp_path


@pytest.mark.parametrize(("scale", "name"), [(s, n) for s in ("demo", "laptop", "gpu", "paper") for n in SCALES[s]])
def test_every_scale_is_valid(project, scale, name):
    exp = open_experiment(scale, name, "dense", "results")
    assert exp.folder == project / "results" / scale / name
    assert {m for m in exp.methods if METHODS[m].learned} <= exp.settings.rankings.keys()
    assert f"{scale} scale" in exp.caption and exp.settings.model in exp.caption


def test_the_paper_scale_is_the_papers_protocol(project):
    settings, photos = (open_experiment("paper", name, "dense").settings for name in (NAME, PHOTOS))
    (dense,), finetune = settings.dense.recipes, settings.finetune.recipe
    assert (settings.model, settings.data.name, settings.data.resolution) == ("resnet56", "cifar10", 32)
    assert (dense.epochs, dense.lr, finetune.epochs, finetune.lr) == (200, 0.1, 400, 0.01)
    for recipe in (dense, finetune):
        assert (recipe.batch_size, recipe.momentum, recipe.nesterov, recipe.weight_decay) == (128, 0.9, True, 5e-4)
        assert (recipe.schedule, recipe.gamma, recipe.milestones) == ("step", 0.2, (0.3, 0.6, 0.8))
    for learned in (settings.rankings["legr"], photos.rankings["legr"]):
        assert (learned.search.population, learned.search.evaluations, learned.search.sample) == (64, 400, 16)
        assert (learned.fitness.recalibration_images, learned.fitness.validation_images) == (0, None)
    assert (settings.rankings["legr"].targets, settings.rankings["legr"].fitness.steps) == ((0.47,), 0)
    assert (settings.floor, settings.trials, settings.data.holdout) == (0.1, 3, 5000)  # a tenth is held out
    assert (photos.model, photos.data.name, photos.data.resolution) == ("mobilenet_v2", "imagenet", 224)
    assert (photos.floor, photos.targets, photos.rankings["legr"].targets) == (0.2, (0.7, 0.6, 0.5), (0.5,))
    steps, recipe = photos.rankings["legr"].fitness, photos.finetune.recipe
    assert (steps.steps, steps.batch_size, steps.lr, photos.data.holdout) == (200, 96, 0.045, 5000)
    assert (recipe.epochs, recipe.batch_size, recipe.weight_decay) == (350, 1024, 1e-5)
    assert (recipe.label_smoothing, recipe.ema, legr.models.mobilenet_v2(10).classifier[0].p) == (0.1, 0.9999, 0.2)
    rates = [recipe.learning_rate(epoch / 350) for epoch in (0, 2.4, 348)]
    assert rates == pytest.approx([0.016 * 1024 / 256 * 0.97**power for power in (0, 1, 145)])


def test_a_method_is_left_out_of_an_experiment_by_its_name_alone(project):
    change(project, lambda params: params["methods"].update(learned=["legr"]))
    exp = open_experiment("demo", NAME, "compare")
    assert exp.methods == ["legr", "norm", "norm-kept", "uniform"] and set(exp.settings.rankings) == {"legr"}


def test_a_playground_reads_what_it_lacks_from_the_pipelines_results(project):
    own, theirs = (project / folder / "demo" / NAME / "dense/dense.json" for folder in ("playground", "results"))
    for path, accuracy in ((theirs, 0.25), (own, 0.75)):
        path.parent.mkdir(parents=True)
        path.write_text(f'{{"accuracy": {accuracy}}}')
        exp = open_experiment("demo", NAME, "sets/norm")
        assert (exp.path("dense/dense.json"), exp.dense["accuracy"]) == (path, accuracy)
    assert exp.out == project / "playground/demo" / NAME / "sets/norm"
    pipelines = open_experiment("demo", NAME, "sets/norm", "results")
    assert pipelines.path("dense/dense.json") == theirs
    assert project / ".state" in pipelines.out.parents  # the runner swaps it in
