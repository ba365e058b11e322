"""Algorithm 1: regularized evolution over (α, κ), as ask and tell, with a state that survives a kill."""

import json
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from legr.data import Dataset
from legr.files import UserError, digest, tensors_digest, write_text
from legr.fitness import Fitness, FitnessSettings, Masks
from legr.graph import Graph
from legr.ranking import FLOOR, Ranking
from legr.training import Compute, Log


class SearchSettings(BaseModel):
    """Algorithm 1's constants; the defaults are the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    population: PositiveInt = 64  # P
    evaluations: PositiveInt = 400  # E, the initial population included
    sample: PositiveInt = 16  # S, drawn with replacement
    mutated: Annotated[float, Field(ge=0, le=1)] = 0.1  # a mutation draws int(mutated · L) of the L layers
    seed: NonNegativeInt = 0
    in_flight: PositiveInt = 1  # candidates evaluated at a time: a mutant does not know the last in_flight - 1

    @model_validator(mode="after")
    def _enough(self) -> "SearchSettings":
        if self.evaluations < self.population:
            raise ValueError(f"evaluations is {self.evaluations}; it must be at least population ({self.population})")
        if self.in_flight > self.population:
            raise ValueError(f"in_flight is {self.in_flight}; it must be at most population ({self.population})")
        return self


class Evolution:
    """Regularized evolution: `ask` for a candidate, `tell` its loss, until `done`.

    Several candidates may be asked for before the first is told; they are told in the order of asking.
    The state (`state`, `restore`) is plain JSON and includes the random generator, so a restored search asks for
    the same candidates as an undisturbed one.

    Args:
        norms: squared filter norms, one tensor [width] per layer.
        start: a ranking to search on from: the first candidate, and its mutants in place of random ones.
    """

    def __init__(self, norms: Sequence[Tensor], settings: SearchSettings, start: Ranking | None = None):
        self.settings, self.start, self.deviations = settings, start, norm_deviations(norms)
        self.generator = np.random.default_rng(settings.seed)
        self.history: list[dict[str, Any]] = []
        self.candidates: list[Ranking] = []
        self.pending: list[Ranking] = []  # asked for and not told yet

    @property
    def done(self) -> bool:
        return len(self.history) >= self.settings.evaluations

    @property
    def best(self) -> Ranking:
        """The candidate with the lowest loss so far; the first of equals."""
        losses = [row["loss"] for row in self.history]
        return self.candidates[losses.index(min(losses))]

    @property
    def asked(self) -> int:
        return len(self.history) + len(self.pending)

    def ask(self) -> Ranking:
        """The next candidate: random at first (the P-th is norm-only), then a mutant of a tournament's winner."""
        self.pending.append(self._next(self.asked))
        return self.pending[-1]

    def _next(self, i: int) -> Ranking:
        size, layers = self.settings.population, len(self.deviations)
        if i == size - 1:
            return Ranking.norm_only(layers)
        if i < size and self.start is None:  # α = exp(N(0, 1)), κ = N(0, s_l)
            scale = np.exp(self.generator.normal(0, 1, layers))
            return Ranking(tuple(scale), tuple(self.generator.normal(0, 1, layers) * self.deviations))
        if i < size:
            return self._mutant(self.start, i) if i else self.start
        oldest = max(len(self.history) - size, 0)  # the last P candidates told are the population
        drawn = oldest + self.generator.integers(0, len(self.history) - oldest, self.settings.sample)
        return self._mutant(self.candidates[min(drawn, key=lambda d: self.history[d]["loss"])], i)

    def _mutant(self, parent: Ranking, i: int) -> Ranking:
        step = 1 - i / (1.25 * self.settings.evaluations)
        scale, shift = np.array(parent.scale), np.array(parent.shift)
        for layer in self.generator.integers(0, len(scale), max(1, int(self.settings.mutated * len(scale)))):
            scale[layer] *= np.exp(self.generator.normal(0, step))
            shift[layer] += self.generator.normal(0, 1) * self.deviations[layer]
        return Ranking(tuple(scale), tuple(shift))

    def tell(self, candidate: Ranking, loss: float, accuracy: float, seconds: float = 0.0) -> None:
        """Record the fitness of the first pending candidate; it replaces the oldest of a full population."""
        if self.pending:
            self.pending.pop(0)
        loss = loss if np.isfinite(loss) else float(np.finfo(np.float32).max)
        best = min(loss, self.history[-1]["best"]) if self.history else loss
        self.candidates.append(candidate)
        row = {"evaluation": len(self.candidates), "loss": loss, "accuracy": accuracy, "best": best}
        self.history.append(row | {"seconds": seconds})

    def state(self) -> dict[str, Any]:
        """Everything that the rest of the search depends on."""
        rankings = {"candidates": self.candidates, "pending": self.pending}
        plain = {name: [[r.scale, r.shift] for r in some] for name, some in rankings.items()}
        return {"generator": self.generator.bit_generator.state, "history": self.history, **plain}

    def restore(self, state: dict[str, Any]) -> None:
        self.generator.bit_generator.state = state["generator"]
        self.history = state["history"]
        self.candidates, self.pending = (
            [Ranking(tuple(scale), tuple(shift)) for scale, shift in state[name]] for name in ("candidates", "pending")
        )


def norm_deviations(norms: Sequence[Tensor]) -> np.ndarray:
    """s_l, the standard deviation of each layer's filter norms: float64 [layers]."""
    return np.array([torch.std(n.double(), correction=0).item() for n in norms])


@dataclass(frozen=True)
class SearchResult:
    """`history` has a row per evaluation: evaluation, loss, accuracy, best (loss so far), seconds."""

    ranking: Ranking  # the best (α, κ)
    history: pd.DataFrame
    candidates: list[Ranking]  # in the order of `history`


def learn_ranking(
    model: nn.Module,
    graph: Graph,
    data: Dataset,
    flops: float | Sequence[float] = 0.47,
    *,
    search: SearchSettings | None = None,
    fitness: FitnessSettings | None = None,
    compute: Compute | None = None,
    floor: float = FLOOR,
    start: Ranking | None = None,
    state_folder: str | Path | None = None,
    submit: Callable[[list[Masks]], Future] | None = None,
    log: Log | None = None,
) -> SearchResult:
    """Learn α and κ by Algorithm 1, evaluating candidates at the lowest FLOP count of interest.

    Args:
        data: candidates are judged on `data.holdout`; recalibration and steps use `data.fit`.
        flops: the fraction of the dense FLOPs at which candidates are judged; with several, see `Fitness`.
        floor: the fraction of each layer that stays at least.
        start: a ranking to search on from; None starts with random ones, as the paper does.
        state_folder: where the state is written after every evaluation, under a name made of
            everything that the result depends on; a search found there is continued.
        submit: starts the evaluation of a candidate's masks elsewhere; its result is that of `Fitness`. Up to
            `search.in_flight` are then on their way. None evaluates here, one after the other. The result
            depends on `in_flight`, not on where candidates are evaluated or which is done first.
        log: called with every evaluation's row of `history`.
    """
    search, compute = search or SearchSettings(), (compute or Compute()).resolve()
    targets = [flops] if isinstance(flops, int | float) else list(flops)
    judge = Fitness(model, graph, data, targets, fitness or FitnessSettings(), compute, floor, search.seed)
    evolution, path = Evolution(judge.norms, search, start), None
    if state_folder is not None:
        given = [tensors_digest(model.state_dict()), data.digest(), data.train.augmentation.model_dump(), targets]
        given += [search.model_dump(), judge.settings.model_dump(), compute.identity(), floor, start and vars(start)]
        path = Path(state_folder) / f"search-{digest(given)}.json"
        if path.exists():
            try:
                evolution.restore(json.loads(path.read_text(encoding="utf-8")))
            except (ValueError, KeyError, TypeError):
                raise UserError(f"search state {path} is corrupt; delete it to search from the start") from None

    known: dict[bytes, Future | dict[str, float]] = {}  # many mutants cut a network that was seen before
    for candidate, row in zip(evolution.candidates, evolution.history, strict=True):
        known.setdefault(_key(judge.select(candidate)), row)
    waiting = deque(evolution.pending)
    keys = deque(_evaluate(judge, candidate, known, submit) for candidate in waiting)
    while not evolution.done:
        began = time.perf_counter()
        while len(waiting) < search.in_flight and evolution.asked < search.evaluations:
            waiting.append(evolution.ask())
            keys.append(_evaluate(judge, waiting[-1], known, submit))
        candidate, result = waiting.popleft(), known[keys.popleft()]
        result = result if isinstance(result, dict) else result.result()
        evolution.tell(candidate, result["loss"], result["accuracy"], time.perf_counter() - began)
        if path is not None:
            write_text(path, json.dumps(evolution.state()))
        if log:
            log(evolution.history[-1])
    return SearchResult(evolution.best, pd.DataFrame(evolution.history), evolution.candidates)


def _key(networks: list[Masks]) -> bytes:
    """Names what a candidate keeps at all targets."""
    return torch.cat([mask for kept in networks for mask in kept]).numpy().tobytes()


def _evaluate(judge: Fitness, candidate: Ranking, known: dict, submit: Callable | None) -> bytes:
    """Have a candidate's networks evaluated unless they are known; returns their key in `known`."""
    networks = judge.select(candidate)
    key = _key(networks)
    if key not in known:
        known[key] = submit(networks) if submit else judge(networks)
    return key
