"""A full disk and a folder that can't be written to: one sentence, nothing half-written, and the next run recovers."""

import shutil
import subprocess
import sys
from contextlib import contextmanager

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from experiments import figures
from legr.errors import UserError
from legr.files import atomic, write_json
from legr.state import load_state, save_state
from tests.conftest import NAME


@contextmanager
def mounted(folder, options):
    """A file system in memory at `folder`; the test is skipped where this user can't mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs a user that can mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def write_tensors(path, size):
    with atomic(path) as temporary:
        save_file({"x": torch.zeros(size)}, temporary)


def draw(path, size):
    points = pd.DataFrame({"evaluation": range(1, size + 1), "loss": 1.0, "best": 1.0})
    figures.save(figures.search(points, "legr", 2, "a caption"), path)


WRITERS = {
    "JSON": lambda path, size: write_json(path, [0] * size),
    "tensors": write_tensors,
    "state": lambda path, size: save_state(path, {"x": torch.zeros(size)}),
    "figure": lambda path, size: draw(path, 20 + size // 50),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, kind):
    with mounted(tmp_path / "small", "size=400k") as folder:
        WRITERS[kind](folder / "file", 4)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=r"file .*file.* can't be written \(.*No space left on device") as error:
            WRITERS[kind](folder / "file", 300_000)
        assert "\n" not in str(error.value)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("kind", WRITERS)
def test_a_read_only_folder_is_one_sentence(tmp_path, kind):
    with (
        mounted(tmp_path / "small", "ro") as folder,
        pytest.raises(UserError, match=r"file .*file.* can't be written \(.*Read-only file system"),
    ):
        WRITERS[kind](folder / "deeper" / "file", 4)


def test_a_state_that_was_written_comes_back(tmp_path):
    save_state(tmp_path / "s", {"x": torch.arange(3), "rows": [{"a": 1.5}]})
    state = load_state(tmp_path / "s")
    assert state["x"].tolist() == [0, 1, 2]
    assert state["rows"] == [{"a": 1.5}]


def stage(folder, *arguments):
    command = [sys.executable, "-m", "experiments", *arguments, "--scale", "demo", "--experiment", NAME]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize("where", [f"results/demo/{NAME}", ".state"])
def test_a_stage_on_a_full_disk_says_so_and_the_next_run_recovers(done, tmp_path, where):
    folder = tmp_path / "project"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns(".dvc", "checkpoints", "__pycache__"))
    kept = folder / "results" / "demo" / NAME / "baseline.safetensors"
    weights = kept.read_bytes()
    with mounted(folder / where, "size=3500k"):
        if where != ".state":
            kept.write_bytes(weights)
        with open(folder / where / "filler", "wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(b"x" * 1024)
        ended = stage(folder, "2_ranking", "--set", "method=legr")
        assert ended.returncode == 1
        last = ended.stderr.strip().splitlines()[-1]
        assert last.startswith("error: file ")
        assert "No space left on device" in last
        assert "Traceback" not in ended.stderr
    kept.write_bytes(weights)
    assert stage(folder, "2_ranking", "--set", "method=legr").returncode == 0
    for name in ("ranking.json", "search.csv"):
        own = folder / "results" / "demo" / NAME / name
        assert own.read_bytes() == (done / "results" / "demo" / NAME / name).read_bytes()
