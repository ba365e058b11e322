"""A procedure in a process of its own: what others leave in memory touches neither its time nor its results.

It matters: glibc hands large blocks back to the system, and fetches them anew for every batch, until something in the
process has happened to change its mind. So the authors' procedure is timed with the allocator as it comes, and again
with the settings that this project's pipeline gives its own processes.
"""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

from benchmarks.yardstick import timed
from experiments.__main__ import KEEP_MEMORY


class Apart:
    """What `make(*arguments)` returns, called in a fresh process; calling it gives its seconds and what it returned.

    Args:
        make: importable; it, its arguments, and those and the results of the calls are pickled.
        keep_memory: the allocator's settings of this project's pipeline; else those that the system comes with.
    """

    def __init__(self, make: Callable[..., Callable], *arguments: Any, keep_memory: bool):
        before = dict(os.environ)
        for name in [name for name in os.environ if name.startswith("MALLOC_")]:
            del os.environ[name]
        try:
            os.environ |= KEEP_MEMORY if keep_memory else {}
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(1, context, _make, (make, arguments))
            self._pool.submit(int).result()  # the process starts here, with this environment
        finally:
            os.environ.clear()
            os.environ |= before

    def __call__(self, *arguments: Any) -> tuple[float, Any]:
        return self._pool.submit(_call, *arguments).result()

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


_procedure: Callable | None = None


def _make(make: Callable[..., Callable], arguments: tuple) -> None:
    global _procedure
    _procedure = make(*arguments)


def _call(*arguments: Any) -> tuple[float, Any]:
    return timed(partial(_procedure, *arguments))()
