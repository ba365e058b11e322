"""Algorithm 1: regularized evolution over (α, κ), as ask and tell, with a state that survives a kill."""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from torch import nn

from legr.data import Dataset
from legr.errors import UserError
from legr.files import digest, write_text
from legr.fitness import Fitness, FitnessSettings
from legr.graph import Graph
from legr.parallel import Judges
from legr.ranking import Ranking, check_fraction, norm_deviations, random_ranking
from legr.state import tensors_digest
from legr.training import Compute

MUTATED = 0.1  # share of the layers that a mutation draws, with replacement


class SearchSettings(BaseModel):
    """Algorithm 1's constants; the defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    population: PositiveInt = 64  # P
    evaluations: PositiveInt = 400  # E, the initial population included
    sample: PositiveInt = 16  # S, drawn with replacement
    seed: NonNegativeInt = 0
    in_flight: PositiveInt = 1  # candidates judged at the same time: a mutant does not know the last in_flight - 1
    racing: Annotated[float, Field(ge=0, lt=1)] = 0.0  # see `Evolution.hopeless`; 0: every candidate is judged fully

    @model_validator(mode="after")
    def _enough(self) -> "SearchSettings":
        if self.evaluations < self.population:
            raise ValueError(f"evaluations is {self.evaluations}; it must be at least population ({self.population})")
        if self.in_flight > self.population:
            raise ValueError(f"in_flight is {self.in_flight}; it must be at most population ({self.population})")
        return self


class Evolution:
    """Regularized evolution: `ask` for a candidate, `tell` its loss, until `done`.

    Several may be asked for before the first is told; they are told in the order they were asked for.

    The state (`state`, `restore`) is plain JSON and holds the random generator too, so a restored
    search asks for the same candidates as an undisturbed one.
    """

    def __init__(self, norms: list, settings: SearchSettings, start: Ranking | None = None):
        self.settings, self.start = settings, start
        self.norms, self.deviations = norms, norm_deviations(norms)
        self.generator = np.random.default_rng(settings.seed)
        self.population: list[tuple[float, Ranking]] = []  # oldest first
        self.history: list[dict[str, Any]] = []
        self.candidates: list[Ranking] = []
        self.pending: list[tuple[Ranking, float]] = []  # asked for and not told yet, with `hopeless` then

    @property
    def done(self) -> bool:
        return len(self.history) >= self.settings.evaluations

    @property
    def best(self) -> Ranking:
        """The candidate with the lowest loss so far."""
        return self.candidates[int(np.argmin([row["loss"] for row in self.history]))]

    def ask(self) -> Ranking:
        """The next candidate: random at first (the P-th is norm-only), then a mutant of a tournament's winner.

        With `start` the first is that, and those that would be random are its mutants.
        """
        candidate = self._next(self.asked)
        self.pending.append((candidate, self.hopeless))
        return candidate

    @property
    def asked(self) -> int:
        return len(self.history) + len(self.pending)

    @property
    def hopeless(self) -> float:
        """The loss from which on a candidate can hardly matter: judging it need not go on. Infinite without racing.

        A member is drawn for a tournament of S and wins it only if none of the b members with lower losses is
        drawn, with probability (1 - b/P)^S at most; it lives for P tournaments. So while the population does not
        get worse, it wins any of them with probability P (1 - b/P)^S at most. The loss returned is that of the
        b-th best member, for the smallest b that brings this bound down to `racing`.
        """
        size, sample, racing = self.settings.population, self.settings.sample, self.settings.racing
        if racing == 0:
            return math.inf
        better = math.ceil(size * (1 - (racing / size) ** (1 / sample)))
        losses = sorted(loss for loss, _ in self.population)
        return losses[better - 1] if better <= len(losses) else math.inf

    def _next(self, i: int) -> Ranking:
        population = self.settings.population
        if i == population - 1:
            return Ranking.norm_only(len(self.norms))
        if i < population:
            if self.start is None:
                return random_ranking(self.norms, self.generator)
            return self._mutant(self.start, i) if i else self.start
        drawn = self.generator.integers(0, len(self.population), self.settings.sample)
        return self._mutant(min((self.population[d] for d in drawn), key=lambda member: member[0])[1], i)

    def _mutant(self, parent: Ranking, i: int) -> Ranking:
        step = 1 - i / (1.25 * self.settings.evaluations)
        scale, shift = np.array(parent.scale), np.array(parent.shift)
        for layer in self.generator.integers(0, len(scale), max(1, round(MUTATED * len(scale)))):
            scale[layer] *= np.exp(self.generator.normal(0, step))
            shift[layer] += self.generator.normal(0, 1) * self.deviations[layer]
        return Ranking(tuple(scale), tuple(shift))

    def tell(self, candidate: Ranking, loss: float, accuracy: float, seconds: float = 0.0, **more: float) -> None:
        """Record a candidate's fitness; it replaces the oldest member of a full population."""
        if self.pending and self.pending[0][0] == candidate:
            self.pending.pop(0)
        loss = loss if np.isfinite(loss) else float(np.finfo(np.float32).max)
        self.candidates.append(candidate)
        best = min([loss] + [row["loss"] for row in self.history])
        row = {
            "evaluation": len(self.history) + 1,
            "loss": loss,
            "accuracy": accuracy,
            "best": best,
            "seconds": seconds,
            **more,
        }
        self.history.append(row)
        self.population = [*self.population, (loss, candidate)][-self.settings.population :]

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the search depends on."""
        return {
            "generator": self.generator.bit_generator.state,
            "history": self.history,
            "candidates": [[c.scale, c.shift] for c in self.candidates],
            "pending": [[c.scale, c.shift, hopeless] for c, hopeless in self.pending],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = state["generator"]
        self.history = state["history"]
        self.candidates = [Ranking(tuple(scale), tuple(shift)) for scale, shift in state["candidates"]]
        self.pending = [(Ranking(tuple(scale), tuple(shift)), hopeless) for scale, shift, hopeless in state["pending"]]
        members = zip((row["loss"] for row in self.history), self.candidates, strict=True)
        self.population = list(members)[-self.settings.population :]


@dataclass(frozen=True)
class SearchResult:
    """`ranking`: the best (α, κ). `history`: evaluation, loss, accuracy, best (so far), seconds, images.

    `images` is how many were seen: with racing fewer than all where `loss` is a lower bound.
    """

    ranking: Ranking
    history: pd.DataFrame
    candidates: list[Ranking]


def learn_ranking(
    model: nn.Module,
    graph: Graph,
    data: Dataset,
    flops: float = 0.47,
    settings: SearchSettings | None = None,
    fitness: FitnessSettings | None = None,
    compute: Compute | None = None,
    state_folder: str | Path | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
    start: Ranking | None = None,
    executor: Executor | None = None,
) -> SearchResult:
    """Learn α and κ by Algorithm 1, judging candidates at the lowest FLOP count of interest.

    Args:
        data: candidates are judged on `data.holdout`; recalibration and steps use `data.fit`.
        flops: the fraction of the dense network's FLOPs at which candidates are judged.
        state_folder: where the state is written after every evaluation, under a name made of
            everything that the result depends on; a search found there is continued.
        log: called with every evaluation's row of `history`.
        start: a ranking to search on from; None starts with random ones, as the paper does.
        executor: judges `settings.in_flight` candidates at a time, such as `parallel.LocalWorkers(2)` or Dask's
            `Client.get_executor()`; None judges here, one after the other. The result depends on `settings`
            alone, never on the executor or on which candidate is done first; to the bit, if all judge with
            the same number of threads. A worker that dies costs its candidate a retry.
    """
    settings, fitness = settings or SearchSettings(), fitness or FitnessSettings()
    compute = (compute or Compute()).resolve()
    check_fraction("flops", flops)
    judge = Fitness(model, graph, data, flops, fitness, compute, settings.seed)
    evolution = Evolution(judge.norms, settings, start)
    path = None
    if state_folder is not None:
        depends = [
            tensors_digest(model.state_dict()),
            data.fingerprint,
            flops,
            settings.model_dump(),
            fitness.model_dump(),
            *([[start.scale, start.shift]] if start else []),
        ]
        path = Path(state_folder) / f"search-{digest([*depends, compute.identity()])}.json"
        if path.exists():
            try:
                evolution.restore(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"search state {path} is corrupt; delete it to search from the start") from None
    judges = Judges(judge, executor) if executor else None
    tasks = [judges.submit(*asked) for asked in evolution.pending] if judges else []
    clock = time.perf_counter()
    while not evolution.done:
        while len(evolution.pending) < settings.in_flight and evolution.asked < settings.evaluations:
            evolution.ask()
            if judges:
                tasks.append(judges.submit(*evolution.pending[-1]))
        candidate, hopeless = evolution.pending[0]
        result = judges.result(tasks.pop(0)) if judges else judge(candidate, hopeless)
        clock, before = time.perf_counter(), clock
        evolution.tell(candidate, seconds=clock - before, **result)
        if path is not None:
            write_text(path, json.dumps(evolution.state()))
        if log:
            log(evolution.history[-1])
    return SearchResult(evolution.best, pd.DataFrame(evolution.history), evolution.candidates)
