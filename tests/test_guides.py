"""The commands that the guides print, run in the order in which they stand there."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import NAME, PROJECT, change


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)


def shell(folder, commands):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {"GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Reader"}
    environment |= {"GIT_CONFIG_KEY_1": "user.email", "GIT_CONFIG_VALUE_1": "reader@example.org"}
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands], cwd=folder, capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, commands + result.stdout + result.stderr
    return result.stdout


def test_the_readme_s_example_runs():
    (example,) = blocks(PROJECT / "README.md", "python")
    result = subprocess.run([sys.executable, "-c", example], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == 3


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_library_pages_examples_run(tmp_path, number):
    script = tmp_path / "example.py"
    script.write_text(blocks(PROJECT / "docs" / "library.md", "python")[number], encoding="utf-8")
    (tmp_path / "results").symlink_to(PROJECT / "results")
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) == (4, 1, 9)[number]


@pytest.mark.slow
@pytest.mark.harness
def test_the_commands_for_tweaking_work(done, tmp_path):
    folder = tmp_path / "clone"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns(".dvc", "playground", "plots"))
    shutil.copytree(done / ".dvc" / "cache", folder / ".dvc" / "cache")
    shutil.copy(PROJECT / ".dvc" / "config", folder / ".dvc")
    shutil.copy(PROJECT / ".gitignore", folder)
    (folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
    shell(folder, "git init -q; git add -A; git commit -q -m Project; dvc status")

    begin, preview, one, back, plots, queue, branch = blocks(PROJECT / "docs" / "tweaking.md", "sh")
    shell(folder, begin)
    change(folder, lambda p: p["demo"][NAME]["finetune"]["recipe"].update(epochs=3))
    told = shell(folder, preview)
    assert "finetune.recipe" in told
    assert "prune@" in told and "Running stage 'ranking" not in told
    assert "longer" in shell(folder, one)
    assert "fine" in (told := shell(folder, back)) or "accuracy" in told or "metrics.json" in told
    shell(folder, plots)
    assert (folder / "dvc_plots" / "index.html").stat().st_size > 5000
    wait = "while [[ $(dvc queue status) =~ Running|Queued ]]; do sleep 2; done"
    shell(folder, queue.replace("dvc queue status", wait))
    assert shell(folder, "dvc exp list --name-only").count("\n") == 3
    shell(folder, branch)
    assert "longer-fine-tuning" in shell(folder, "git branch")
