"""Copies of the project: by git with other line ends, and without git, as from a zip archive."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PIPELINE, PROJECT, copy_project, dvc

needs_git = pytest.mark.skipif(not (PROJECT / ".git").exists(), reason="needs the project's git history")


def git(folder, *arguments):
    return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout


@needs_git
def test_line_ends_change_no_file(tmp_path):
    """A clone as Windows' git makes it: every file is as it was committed, records and code too."""
    git(tmp_path, "clone", "-q", "-c", "core.autocrlf=true", "-c", "core.eol=crlf", str(PROJECT), "clone")
    clone = tmp_path / "clone"
    assert not git(clone, "status", "--porcelain")
    for name in git(PROJECT, "ls-tree", "-r", "--name-only", "HEAD", "legr", "params.yaml").split():
        assert (clone / name).read_bytes() == git(PROJECT, "show", f"HEAD:{name}").encode(), name


def test_a_zip_archive_runs_without_git(tmp_path):
    """`make repro` prepares it before DVC runs, which would refuse."""
    copy_project(tmp_path, *PIPELINE, "Makefile", ".dvc/config")
    assert "is not a git repository" in dvc(tmp_path, "status", check=False)
    virtual = f"VENV={Path(sys.executable).parent.parent}"
    command = ["make", "ready", "-o", "install", virtual]
    path = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
    told = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=path, check=True).stdout
    assert "No git here" in told
    assert "data@demo-cifar10-resnet56" in dvc(tmp_path, "status")
