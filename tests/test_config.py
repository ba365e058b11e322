"""params.yaml: what its scales say, and overrides. Mistakes are in test_mistakes.py."""

import shutil
from pathlib import Path

import pytest

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


def test_overrides_leave_the_prepared_images_alone(project):
    with pytest.raises(legr.UserError, match=r"overrides has 'data\.holdout'"):
        workspace("demo", NAME, None, {"data.holdout": 5})
