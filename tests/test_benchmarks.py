"""The benchmarks measure what they say: each procedure alone, with the allocator it is said to have."""

import os

import pytest

from benchmarks.apart import Apart
from benchmarks.yardstick import side_by_side, timed


def counter(step):
    """A procedure with memory: calls so far, times `step`, and what its process was started with."""
    calls = []

    def count():
        calls.append(None)
        return os.getpid(), step * len(calls), os.environ.get("MALLOC_TRIM_THRESHOLD_")

    return count


def broken(_):
    def fail():
        raise ValueError("no")

    return fail


def test_each_procedure_has_a_process_and_an_allocator_of_its_own(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "123")
    with Apart(counter, 1, keep_memory=False) as stock, Apart(counter, 10, keep_memory=True) as kept:
        found = [run()[1] for run in (stock, kept, stock, kept)]
        seconds, _ = stock()
    assert os.environ["MALLOC_TRIM_THRESHOLD_"] == "123"
    processes, counts, settings = zip(*found, strict=True)
    assert len({os.getpid(), *processes}) == 3 and 0 <= seconds < 1
    assert counts == (1, 10, 2, 20)
    assert settings == (None, str(2**34)) * 2


def test_an_error_of_a_procedure_is_told():
    with Apart(broken, 0, keep_memory=False) as procedure, pytest.raises(ValueError, match="no"):
        procedure()


def test_medians_leave_the_first_call_out():
    times = iter([100.0, 1.0, 2.0, 30.0])
    assert side_by_side({"a": lambda: (next(times), None)}, 3) == {"a": 2.0}
    seconds, found = timed(lambda: "found")()
    assert found == "found" and 0 <= seconds < 1
