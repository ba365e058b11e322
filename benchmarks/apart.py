"""Procedures in processes of their own, which take turns: none meets what another left in memory."""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from multiprocessing import get_context
from statistics import median

import torch


def side_by_side(calls: Mapping[str, tuple], threads: Sequence[int], turns: int = 3) -> dict[int, dict[str, float]]:
    """Median seconds by number of threads and name; the first turn with each number of threads is not counted.

    A call is (make, *arguments), which can be pickled; what is timed is the function that `make(*arguments)` returns.
    """
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for name in calls}
        schedule = [(count, turn, name) for count in threads for turn in range(turns + 1) for name in calls]
        seconds = {key: pools[key[2]].submit(_time, key[0], *calls[key[2]]).result() for key in schedule}
    return {n: {name: median(seconds[n, t + 1, name] for t in range(turns)) for name in calls} for n in threads}


_made = cache(lambda make, *arguments: make(*arguments))


def _time(threads: int, *call: object) -> float:
    procedure = _made(*call)
    torch.set_num_threads(threads)
    start = time.perf_counter()
    procedure()
    return time.perf_counter() - start
