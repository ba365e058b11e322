"""Independent work as jobs: here, one after the other, or side by side on a Dask cluster; and progress bars.

A job is a function of a module with an experiment and small values as arguments. Workers open the experiment anew
and read its images from the prepared file. `workers` in params.yaml is a number of processes to start here (with one
thread each), or the address of a running scheduler. Workers whose device is CUDA share the GPU.
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments import KEEP_MEMORY
from experiments.config import Experiment, code, open_experiment
from legr.files import UserError

ATTEMPTS = 3  # a job whose worker dies is tried again
QUIET = {  # Dask watches itself many times a second by default, which takes a tenth of a core
    "distributed.admin.system-monitor.interval": "10s",
    "distributed.admin.tick.interval": "2s",
    "distributed.admin.tick.limit": "60s",
    "distributed.worker.profile.enabled": False,
}


class Jobs:
    """Submits jobs of one experiment; made by `open_jobs`. `client`: of the cluster; None: jobs are done here."""

    def __init__(self, exp: Experiment, client: Any = None):
        self.exp, self.client = exp, client

    def submit(self, function: Callable, *arguments: Any) -> Future:
        """`function(experiment, *arguments)`, on its way to a worker or, here, done when this returns."""
        exp = self.exp
        if self.client is None:
            done: Future = Future()
            done.set_result(function(exp, *arguments))
            return done
        address = (str(exp.root), exp.scale, exp.name, exp.stage, exp.results, json.dumps(exp.overrides))
        return self.client.submit(_work, function, address, arguments, code(), pure=False, retries=ATTEMPTS - 1)

    def run(self, function: Callable, each: Iterable[tuple], what: str) -> list[Any]:
        """Results of `function(experiment, *arguments)` for all of `each`, in order."""
        futures = [self.submit(function, *arguments) for arguments in each]
        return [future.result() for future in tqdm(futures, desc=what, disable=self.client is None)]


@contextmanager
def open_jobs(exp: Experiment) -> Iterator[Jobs]:
    """Jobs of an experiment, with the workers that its settings ask for."""
    workers = exp.settings.workers
    if workers == 1:
        yield Jobs(exp)
        return
    import dask
    from distributed import Client, LocalCluster

    settings = {f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in KEEP_MEMORY.items()}
    settings["distributed.worker.daemon"] = False  # so that they may start processes that decode images
    with ExitStack() as opened:
        opened.enter_context(dask.config.set({"distributed.scheduler.allowed-failures": ATTEMPTS} | QUIET | settings))
        try:
            if isinstance(workers, int):
                # By default a worker that takes more than its cores' share of the memory is killed: CUDA may.
                workers = opened.enter_context(LocalCluster(workers, threads_per_worker=1, memory_limit=None))
            client = opened.enter_context(Client(workers, timeout=20))
        except (OSError, ValueError) as error:
            raise UserError(f"workers is {workers!r}; no Dask scheduler answers there ({error})") from None
        print(f"{exp.stage}: dashboard at {client.dashboard_link}", file=sys.stderr)
        yield Jobs(exp, client)


@lru_cache(maxsize=2)
def _reopened(root: str, scale: str, name: str, stage: str, results: str, overrides: str) -> Experiment:
    return open_experiment(scale, name, stage, results, json.loads(overrides), Path(root))


def _work(function: Callable, address: tuple[str, ...], arguments: tuple, code_of_job: str) -> Any:
    """On a worker."""
    if code() != code_of_job:
        here, there = Path(__file__).parent.parent, address[0]
        raise UserError(f"a worker has other code (in {here}) than the job from {there}; start workers with its code")
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
