"""Files are whole or as they were; names for what a result depends on."""

import os
import resource
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from legr.files import UserError, atomic, digest, load_state, save_state, tensors_digest, write_json


@contextmanager
def room_for(size):
    """No file can grow beyond `size` bytes, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_tensors(path, tensors):
    with atomic(path) as temporary:
        save_file(tensors, temporary)


WRITERS = {
    "JSON": lambda path, size: write_json(path, [0] * size),
    "tensors": lambda path, size: write_tensors(path, {"x": torch.zeros(size)}),
    "state": lambda path, size: save_state(path, {"x": torch.zeros(size)}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_full_disk_is_one_sentence_and_leaves_the_old_file(tmp_path, kind):
    WRITERS[kind](tmp_path / "file", 4)
    before = (tmp_path / "file").read_bytes()
    with pytest.raises(UserError, match=r"^file .*file can't be written \(.*too large.*$"), room_for(100_000):
        WRITERS[kind](tmp_path / "file", 300_000)
    assert (tmp_path / "file").read_bytes() == before
    assert os.listdir(tmp_path) == ["file"]


def test_work_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "file") as temporary:
        temporary.write_text("half of the n")
        raise KeyboardInterrupt
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]
    with atomic(tmp_path / "file") as temporary:
        temporary.write_text("new")
        assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "file").read_text() == "new"


def test_a_state_comes_back_or_is_refused(tmp_path):
    assert load_state(tmp_path / "s") is None
    save_state(tmp_path / "s", {"x": torch.arange(3), "rows": [{"a": 1.5}]})
    state = load_state(tmp_path / "s")
    assert state["x"].tolist() == [0, 1, 2] and state["rows"] == [{"a": 1.5}]
    whole = (tmp_path / "s").read_bytes()
    for content in (whole[:100], b""):
        (tmp_path / "s").write_bytes(content)
        with pytest.raises(UserError, match="file .*s is corrupt .*; delete it"):
            load_state(tmp_path / "s")


def test_digests_name_values():
    assert digest({"a": 1, "b": [2, None]}) == digest({"b": [2, None], "a": 1}) != digest({"a": 1, "b": [2, 0]})
    x, n = torch.arange(12.0).view(1, 3, 2, 2), torch.tensor(1)
    name = tensors_digest({"x": x, "n": n})
    assert name == tensors_digest({"n": n, "x": x.contiguous(memory_format=torch.channels_last)})
    others = [
        {"y": x, "n": n},
        {"x": x.view(3, 4), "n": n},
        {"x": x.double(), "n": n},
        {"x": x + 1e-6, "n": n},
        {"x": x},
    ]
    assert len({name, *map(tensors_digest, others)}) == 6
