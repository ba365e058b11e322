"""The committed records are those that params.yaml asks for; renewing them changes names, and no values."""

import shutil

import pytest

from experiments.pipeline import renew
from tests.conftest import NAME, PHOTOS, PROJECT, change, contents


@pytest.fixture(params=[NAME, PHOTOS])
def project(request, tmp_path, monkeypatch):
    """A folder with an experiment's committed results, and its name."""
    pictures = shutil.ignore_patterns("*.png", "*.svg", "*.gif", "*.ipynb", "images.zip")
    results = f"results/laptop/{request.param}"
    shutil.copytree(PROJECT / results, tmp_path / results, ignore=pictures)
    shutil.copy(PROJECT / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path, request.param


def test_the_committed_records_are_as_params_asks_for_and_stay_as_they_are(project, capsys):
    folder, name = project
    before = contents(folder)
    assert renew.main("laptop", name) == 0 and not capsys.readouterr().out
    assert contents(folder) == before


def test_another_value_is_refused(project, capsys):
    folder, name = project
    change(folder, lambda params: params["laptop"][name]["finetune"]["recipe"].update(lr=0.5))
    before = contents(folder)
    assert renew.main("laptop", name) == 4 * 4 * 3
    assert "sets/norm/0.7-0.json is refused: settings.finetune.recipe.lr was 0.0" in capsys.readouterr().out
    assert contents(folder) == before


def test_another_name_is_another_key_of_the_same_result(project, monkeypatch):
    folder, name = project
    before = contents(folder)
    for path in folder.glob("results/laptop/*/rankings/*/record-*.json"):
        path.write_text(path.read_text().replace('"targets"', '"flops"'))
    assert contents(folder) != before and renew.main("laptop", name) == 2 * 3
    monkeypatch.setitem(renew.RENAMED, "flops", "targets")
    assert renew.main("laptop", name) == 0
    assert contents(folder) == before
