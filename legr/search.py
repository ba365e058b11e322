"""Algorithm 1: regularized evolution over (α, κ), as ask and tell, with a state that survives a kill."""

import json
import time
from collections.abc import Callable, Iterable
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
from legr.parallel import Judges, Part, Task, judge
from legr.racing import Race
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
    # How probably racing may make the search another one than without it, see `legr.racing`; 0: no racing.
    racing: Annotated[float, Field(ge=0, lt=1)] = 0.0

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
    Candidates are numbered in that order, from 0.

    The state (`state`, `restore`) is plain JSON and holds the random generator too, so a restored
    search asks for the same candidates as an undisturbed one.
    """

    def __init__(
        self,
        norms: list,
        settings: SearchSettings,
        start: Ranking | None = None,
        lowest: Callable[[Iterable[int]], int] | None = None,
    ):
        """`lowest` picks a tournament's winner, the candidate with the lowest loss of those with the given numbers;
        None goes by the losses told."""
        self.settings, self.start = settings, start
        self.norms, self.deviations = norms, norm_deviations(norms)
        self.generator = np.random.default_rng(settings.seed)
        self.history: list[dict[str, Any]] = []
        self.candidates: list[Ranking] = []
        self.pending: list[Ranking] = []  # asked for and not told yet
        self.lowest = lowest or (lambda numbers: min(numbers, key=lambda number: self.history[number]["loss"]))

    @property
    def done(self) -> bool:
        return len(self.history) >= self.settings.evaluations

    @property
    def best(self) -> Ranking:
        """The candidate with the lowest loss so far, of equals the first."""
        losses = [row["loss"] for row in self.history]
        return self.candidates[losses.index(min(losses))]

    @property
    def population(self) -> range:
        """The numbers of the last P candidates told, oldest first."""
        told = len(self.history)
        return range(max(told - self.settings.population, 0), told)

    def ask(self) -> Ranking:
        """The next candidate: random at first (the P-th is norm-only), then a mutant of a tournament's winner.

        With `start` the first is that, and those that would be random are its mutants.
        """
        candidate = self._next(self.asked)
        self.pending.append(candidate)
        return candidate

    @property
    def asked(self) -> int:
        return len(self.history) + len(self.pending)

    def _next(self, i: int) -> Ranking:
        size = self.settings.population
        if i == size - 1:
            return Ranking.norm_only(len(self.norms))
        if i < size:
            if self.start is None:
                return random_ranking(self.norms, self.generator)
            return self._mutant(self.start, i) if i else self.start
        drawn = self.generator.integers(0, len(self.population), self.settings.sample)
        return self._mutant(self.candidates[self.lowest(self.population[d] for d in drawn)], i)

    def _mutant(self, parent: Ranking, i: int) -> Ranking:
        step = 1 - i / (1.25 * self.settings.evaluations)
        scale, shift = np.array(parent.scale), np.array(parent.shift)
        for layer in self.generator.integers(0, len(scale), max(1, round(MUTATED * len(scale)))):
            scale[layer] *= np.exp(self.generator.normal(0, step))
            shift[layer] += self.generator.normal(0, 1) * self.deviations[layer]
        return Ranking(tuple(scale), tuple(shift))

    def tell(self, candidate: Ranking, loss: float, accuracy: float, seconds: float = 0.0, **more: float) -> None:
        """Record a candidate's fitness; it replaces the oldest member of a full population."""
        if self.pending and self.pending[0] == candidate:
            self.pending.pop(0)
        loss = loss if np.isfinite(loss) else float(np.finfo(np.float32).max)
        number = len(self.history)
        self.candidates.append(candidate)
        best = min(loss, self.history[-1]["best"]) if self.history else loss
        row = {"evaluation": number + 1, "loss": loss, "accuracy": accuracy, "best": best, "seconds": seconds}
        self.history.append(row | more)

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the search depends on."""
        return {
            "generator": self.generator.bit_generator.state,
            "history": self.history,
            "candidates": [[c.scale, c.shift] for c in self.candidates],
            "pending": [[c.scale, c.shift] for c in self.pending],
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = state["generator"]
        self.history = state["history"]
        self.candidates = [Ranking(tuple(scale), tuple(shift)) for scale, shift in state["candidates"]]
        self.pending = [Ranking(tuple(scale), tuple(shift)) for scale, shift in state["pending"]]


@dataclass(frozen=True)
class SearchResult:
    """`ranking`: the best (α, κ). `history`: evaluation, loss, accuracy, best (so far), seconds, images, network.

    `network` is the evaluation that first had the same network: a network is judged once.

    `loss` and `accuracy` are means over the number of validation `images` that were seen: with racing not always
    all, but all for the best. `best` is then, before the last row, an estimate: the loss of the candidate
    in front by then, over the images that it had seen. `seconds` is the time from the row before to this one.
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
    if settings.racing and len(fitness.counts(flops)) > 1:
        raise UserError(f"racing is {settings.racing}; it must be 0 where also_at has further FLOP counts to judge at")
    judged = Fitness(model, graph, data, flops, fitness, compute, settings.seed)
    search = Search(judged, settings, start, Judges(judged, executor) if executor else None)
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
                search.restore(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"search state {path} is corrupt; delete it to search from the start") from None
    while not search.evolution.done:
        search.step()
        if path is not None:
            write_text(path, json.dumps(search.state()))
        if log:
            log(search.evolution.history[-1])
    return search.result()


class Search:
    """An evolution and what judges its candidates: here or on an executor's workers, fully or by racing.

    `learn_ranking` steps it to its end; by hand, `step` until `evolution.done`, then `result`.
    """

    def __init__(
        self,
        fitness: Fitness,
        settings: SearchSettings,
        start: Ranking | None = None,
        judges: Judges | None = None,
    ):
        self.fitness, self.settings, self.judges = fitness, settings, judges
        self.images = len(fitness.validation)
        self.race: Race | None = None
        self.first: Part = None  # the images that a candidate is judged on before it is told
        if settings.racing:
            comparisons = settings.evaluations * settings.sample  # S - 1 of a tournament's, and the best's with each
            self.race = Race(fitness.validation.labels.cpu().numpy(), settings.racing, comparisons, self._see)
            self.first = (0, self.race.looks[0])
        self.evolution = Evolution(fitness.norms, settings, start, self._lowest if self.race else None)
        # Many mutants cut the very network that one before them did: it is judged once. The networks of all asked for,
        # and by network the number of the first that had it.
        self.networks: list[str] = []
        self.originals: dict[str, int] = {}
        self.tasks: list[Task | None] = []  # of the evolution's pending candidates; None: has an original
        self.clock = time.perf_counter()

    def step(self) -> None:
        """Judge one candidate, and send others on their way."""
        evolution = self.evolution
        while len(evolution.pending) < self.settings.in_flight and evolution.asked < self.settings.evaluations:
            network = self.fitness.fingerprint(evolution.ask())
            self.originals.setdefault(network, len(self.networks))
            self.networks.append(network)
            self._submit(len(self.networks) - 1)
        candidate, number = evolution.pending[0], len(evolution.history)
        original, task = self._original(number), self.tasks.pop(0)
        if original < number:
            row = evolution.history[original]
            found = {name: row[name] for name in ("loss", "accuracy", "images")}
        else:
            judged = self.judges.result(task) if task else judge(self.fitness, candidate, self.first)
            if self.race:
                self.race.tell(number, judged[0])
                seen = judged.shape[1]
                found = {"loss": self.race.loss(number), "accuracy": float(judged[1].mean()), "images": seen}
            else:
                found = judged | {"images": self.images}
        evolution.tell(candidate, **found, network=original + 1)
        if self.race:  # what is in front by now
            evolution.history[number]["best"] = min(row["loss"] for row in evolution.history)
        evolution.history[number]["seconds"] = self._lap()

    def result(self) -> SearchResult:
        """Of a search that is done; racing settles which candidate is the best only now."""
        evolution = self.evolution
        best, last = evolution.best, evolution.history[-1]
        if self.race:
            number = self.race.lowest(self.race.losses)
            self.race.finish(number)
            best, last["best"] = evolution.candidates[number], self.race.loss(number)
            last["seconds"] += self._lap()
        return SearchResult(best, pd.DataFrame(evolution.history), evolution.candidates)

    def _original(self, number: int) -> int:
        """The number of the first candidate with the same network."""
        return self.originals[self.networks[number]]

    def _submit(self, number: int) -> None:
        if self.judges and self._original(number) == number:
            candidate = self.evolution.pending[number - len(self.evolution.history)]
            self.tasks.append(self.judges.submit(candidate, self.first))
        else:
            self.tasks.append(None)

    def _lap(self) -> float:
        """Seconds since this was last asked."""
        self.clock, before = time.perf_counter(), self.clock
        return self.clock - before

    def _lowest(self, numbers: Iterable[int]) -> int:
        """The race's winner; of candidates with the same network the first of `numbers`."""
        named: dict[int, int] = {}
        for number in numbers:
            named.setdefault(self._original(number), number)
        return named[self.race.lowest(named)]

    def _see(self, numbers: list[int], upto: int) -> None:
        """Judge told candidates on more images."""
        race, history = self.race, self.evolution.history
        work = [(self.evolution.candidates[number], (race.seen(number), upto)) for number in numbers]
        if self.judges:
            tasks = [self.judges.submit(*item) for item in work]
            results = [self.judges.result(task) for task in tasks]
        else:
            results = [judge(self.fitness, *item) for item in work]
        for number, found in zip(numbers, results, strict=True):
            before = race.seen(number)
            race.tell(number, found[0])
            right = history[number]["accuracy"] * before + float(found[1].sum())
            for row in history:
                if row["network"] == number + 1:
                    row.update(loss=race.loss(number), accuracy=right / upto, images=upto)

    def state(self) -> dict[str, Any]:
        state = self.evolution.state() | {"networks": self.networks}
        return state | ({"losses": self.race.state()} if self.race else {})

    def restore(self, state: dict[str, Any]) -> None:
        self.evolution.restore(state)
        self.networks = state["networks"]
        for number, network in enumerate(self.networks):
            self.originals.setdefault(network, number)
        if self.race:
            self.race.restore(state["losses"])
        for number in range(len(self.evolution.history), len(self.networks)):
            self._submit(number)
