"""Judging candidates elsewhere: on any concurrent.futures.Executor, or on processes of this machine."""

import hashlib
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from legr.errors import UserError
from legr.fitness import Fitness
from legr.ranking import Ranking

TRIES = 3  # a worker that dies costs its candidate one of them
Part = tuple[int, int] | None  # the validation images from one to another, or all
Result = dict[str, float] | np.ndarray  # as `Fitness` gives for all, and for a part


@dataclass
class Task:
    """A candidate that is being judged."""

    ranking: Ranking
    part: Part
    future: Future


def judge(fitness: Fitness, ranking: Ranking, part: Part) -> Result:
    return fitness(ranking) if part is None else fitness.part(ranking, *part)


class Judges:
    """Sends candidates to the workers of an executor, and the fitness only to those that do not have it yet."""

    def __init__(self, fitness: Fitness, executor: Executor):
        self.executor, self.fitness = executor, pickle.dumps(fitness)
        self.name = hashlib.sha256(self.fitness).hexdigest()

    def submit(self, ranking: Ranking, part: Part = None) -> Task:
        return Task(ranking, part, self._send(ranking, part))

    def result(self, task: Task) -> Result:
        """Waits for a candidate's fitness; UserError if its judging failed three times."""
        for attempt in range(1, TRIES + 1):
            try:
                result = task.future.result()
                if result is None:
                    result = self._send(task.ranking, task.part, self.fitness).result()
                return result
            except UserError:
                raise
            except Exception as error:  # what a dead worker raises depends on the executor
                if attempt == TRIES:
                    raise UserError(
                        f"executor failed {TRIES} times to judge one candidate ({type(error).__name__}: {error}); "
                        "look at its workers' memory and logs"
                    ) from error
                task.future = self._send(task.ranking, task.part)
        raise AssertionError

    def _send(self, ranking: Ranking, part: Part, fitness: bytes | None = None) -> Future:
        return self.executor.submit(_judge, self.name, fitness, ranking, part)


_known: dict[str, Fitness] = {}  # in a worker: the fitness it was sent last


def _judge(name: str, pickled: bytes | None, ranking: Ranking, part: Part) -> Result | None:
    """In a worker: the candidate's fitness, or None where the worker has not got what judges it."""
    fitness = _known.get(name)
    if fitness is None:
        if pickled is None:
            return None
        fitness = pickle.loads(pickled)
        _known.clear()
        _known[name] = fitness
    return judge(fitness, ranking, part)


class LocalWorkers(Executor):
    """`count` processes that share this machine's cores out between them; dead ones are replaced."""

    def __init__(self, count: int):
        if count < 1:
            raise UserError(f"workers is {count}; it must be at least 1")
        self.count, self.threads = count, max(torch.get_num_threads() // count, 1)
        self.pool = self._start()

    def submit(self, function: Callable, /, *args: Any, **kwargs: Any) -> Future:
        try:
            return self.pool.submit(function, *args, **kwargs)
        except BrokenExecutor:  # it takes no more work once one of its processes died
            self.pool.shutdown(wait=False)
            self.pool = self._start()
            return self.pool.submit(function, *args, **kwargs)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.pool.shutdown(wait, cancel_futures=cancel_futures)

    def _start(self) -> ProcessPoolExecutor:
        spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks as they are
        return ProcessPoolExecutor(self.count, spawn, _begin, (self.threads,))


def _begin(threads: int) -> None:
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed can't tell its workers to stop."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
