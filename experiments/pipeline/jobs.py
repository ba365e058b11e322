"""Independent work as jobs: here, one after the other or side by side, or on a Dask cluster; and progress bars.

A job is a function of a module with an experiment and small values as arguments. Workers open the experiment anew
and read its images from the prepared file. `workers` in params.yaml is a number of processes to start here (with one
thread each), or the address of a running scheduler. Workers whose device is CUDA share the GPU.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import joblib
import torch
from tqdm import tqdm

from experiments import KEEP_MEMORY
from experiments.experiment import Experiment, code, open_experiment
from legr.files import UserError


def run(exp: Experiment, function: Callable, each: Iterable[tuple], what: str) -> list[Any]:
    """Results of `function(experiment, *arguments)` for all of `each`, in order; `what` names the progress bar."""
    each, workers = list(each), exp.settings.workers
    if workers == 1 or not each:
        return [function(exp, *arguments) for arguments in each]
    address = (str(exp.root), exp.scale, exp.name, exp.stage, exp.results, json.dumps(exp.overrides))
    calls = [joblib.delayed(_work)(function, address, arguments, code()) for arguments in each]
    with _workers(workers):
        results = joblib.Parallel(return_as="generator")(calls)
        return list(tqdm(results, total=len(calls), desc=what))


@contextmanager
def _workers(workers: int | str) -> Iterator[None]:
    """While it lasts, joblib works with so many processes of this machine, or on the cluster at this address."""
    if isinstance(workers, int):
        os.environ |= KEEP_MEMORY | os.environ
        with joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
            yield
        return
    try:
        from distributed import Client
    except ImportError:
        raise UserError(f"workers is {workers!r}; a cluster needs the package distributed, or give a number") from None
    try:
        client = Client(workers, timeout=20)
    except (OSError, ValueError) as error:
        raise UserError(f"workers is {workers!r}; no Dask scheduler answers there ({error})") from None
    with client, joblib.parallel_config("dask"):
        yield


@lru_cache(maxsize=2)
def _reopened(root: str, scale: str, name: str, stage: str, results: str, overrides: str) -> Experiment:
    return open_experiment(scale, name, stage, results, json.loads(overrides), Path(root))


def _work(function: Callable, address: tuple[str, ...], arguments: tuple, code_of_job: str) -> Any:
    """On a worker."""
    if code() != code_of_job:
        here, there = Path(__file__).parents[2], address[0]
        raise UserError(f"a worker has other code (in {here}) than the job from {there}; start workers with its code")
    # Loky's own way to start processes is for itself alone; those that decode images start in Python's.
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    exp = _reopened(*address)
    torch.set_num_threads(1)
    return function(exp, *arguments)


def progress(what: str, total: int, *shown: str) -> Callable[[dict[str, Any]], None]:
    """A `log` for `train` and `learn_ranking`: a bar with the last row's numbers and the time left."""
    bar = tqdm(total=total, desc=what, mininterval=1)

    def log(row: dict[str, Any]) -> None:
        number = row.get("evaluation", row.get("epoch"))
        if bar.n == 0:  # work found finished does not count towards the time left
            bar.initial = bar.n = number - 1
        bar.set_postfix({name: f"{row[name]:.3f}" for name in shown if name in row}, refresh=False)
        bar.update()
        if number == total:
            bar.close()

    return log
