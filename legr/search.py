"""Algorithm 1: regularized evolution over (α, κ), as ask and tell; an interrupted search is replayed."""

import json
import time
import warnings
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from legr.data import Dataset
from legr.files import (
    Settings,
    UserError,
    code_digest,
    computation,
    source,
    state_path,
    tensors_digest,
    write_json,
)
from legr.fitness import Fitness, FitnessSettings
from legr.graph import Graph
from legr.ranking import FLOOR, Ranking
from legr.surgery import prune
from legr.training import Compute, Log, Recipe, evaluate, train


class SearchSettings(Settings):
    """Algorithm 1's constants; the defaults are the paper's."""

    population: PositiveInt = 64  # P
    evaluations: PositiveInt = 400  # E, the initial population included
    sample: PositiveInt = 16  # S, drawn with replacement
    # A mutation draws int(mutated · L) of the L layers, and one at least.
    mutated: Annotated[float, Field(ge=0, le=1)] = 0.1
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _enough(self) -> "SearchSettings":
        if self.evaluations < self.population:
            raise ValueError(f"evaluations is {self.evaluations}; it must be at least population ({self.population})")
        return self


class FinalistSettings(Settings):
    """A second look at a search's best candidates: each is trained, and the highest held-out accuracy wins.

    Trainings shorter than about three epochs, or without a falling rate, show a head start and not the order that a
    whole fine-tuning ends in.
    """

    count: PositiveInt = 5  # of the candidates with the lowest losses that cut different networks, beside norm-only
    targets: Annotated[tuple[float, ...], Field(min_length=1)]  # fractions of the dense FLOPs at which they are trained
    recipe: Recipe


class Evolution:
    """Regularized evolution: `ask` for a candidate, `tell` its loss, until `done`.

    Told the same losses again, it asks for the same candidates.

    Args:
        norms: squared filter norms, one tensor [width] per layer.
        start: a ranking to search on from: the first candidate, and its mutants in place of random ones.
    """

    def __init__(self, norms: Sequence[Tensor], settings: SearchSettings, start: Ranking | None = None):
        self.settings, self.start, self.deviations = settings, start, norm_deviations(norms)
        self.generator = np.random.default_rng(settings.seed)
        self.candidates: list[Ranking] = []  # those that were told
        self.history: list[dict[str, Any]] = []  # a row for each of them

    @property
    def done(self) -> bool:
        return len(self.history) >= self.settings.evaluations

    @property
    def best(self) -> Ranking:
        """The candidate with the lowest loss so far; the first of equals."""
        return self.candidates[min(range(len(self.history)), key=self._loss)]

    def ask(self) -> Ranking:
        """The next candidate: random at first (the P-th is norm-only), then a mutant of a tournament's winner."""
        i, size, layers = len(self.history), self.settings.population, len(self.deviations)
        if i == 0 and self.start is not None:
            return self.start
        if i == size - 1:
            return Ranking.norm_only(layers)
        if i < size and self.start is None:  # α = exp(N(0, 1)), κ = N(0, s_l)
            scale = np.exp(self.generator.normal(0, 1, layers))
            return Ranking(tuple(scale), tuple(self.generator.normal(0, 1, layers) * self.deviations))
        if i < size:
            return self._mutant(self.start, i)
        drawn = i - size + self.generator.integers(0, size, self.settings.sample)  # the last P are the population
        return self._mutant(self.candidates[min(drawn, key=self._loss)], i)

    def _loss(self, told: int) -> float:
        return self.history[told]["loss"]

    def _mutant(self, parent: Ranking, i: int) -> Ranking:
        step = 1 - i / (1.25 * self.settings.evaluations)
        scale, shift = np.array(parent.scale), np.array(parent.shift)
        for layer in self.generator.integers(0, len(scale), max(1, int(self.settings.mutated * len(scale)))):
            scale[layer] *= np.exp(self.generator.normal(0, step))
            shift[layer] += self.generator.normal(0, 1) * self.deviations[layer]
        return Ranking(tuple(scale), tuple(shift))

    def tell(self, candidate: Ranking, loss: float, accuracy: float, seconds: float = 0.0) -> None:
        """Record a candidate's fitness; it replaces the oldest of a full population."""
        loss = loss if np.isfinite(loss) else float(np.finfo(np.float32).max)
        best = min(loss, self.history[-1]["best"]) if self.history else loss
        self.candidates.append(candidate)
        row = {"evaluation": len(self.candidates), "loss": loss, "accuracy": accuracy, "best": best}
        self.history.append(row | {"seconds": seconds})


def norm_deviations(norms: Sequence[Tensor]) -> np.ndarray:
    """s_l, the standard deviation of each layer's filter norms: float64 [layers]."""
    return np.array([torch.std(n.double(), correction=0).item() for n in norms])


@dataclass(frozen=True)
class SearchResult:
    """`history` has a row per evaluation: evaluation, loss, accuracy, best (loss so far), seconds."""

    ranking: Ranking  # the best (α, κ)
    history: pd.DataFrame
    candidates: list[Ranking]  # in the order of `history`
    finalists: pd.DataFrame | None = None  # of a second look, see `_second_look`


def learn_ranking(
    model: nn.Module,
    graph: Graph,
    data: Dataset,
    targets: float | Sequence[float] = 0.47,
    *,
    search: SearchSettings | None = None,
    fitness: FitnessSettings | None = None,
    compute: Compute | None = None,
    floor: float = FLOOR,
    keep: Collection[str] = (),
    start: Ranking | None = None,
    finalists: FinalistSettings | None = None,
    state_folder: str | Path | None = None,
    log: Log | None = None,
) -> SearchResult:
    """Learn α and κ by Algorithm 1, evaluating candidates at the lowest FLOP count of interest.

    Many mutants cut the same network as a candidate before them; every network is evaluated once. Where all have one
    loss, the ranking is norm-only, and a warning says why.

    Args:
        data: candidates are judged on `data.holdout`; recalibration and steps use `data.fit`.
        targets: the fraction of the dense FLOPs at which candidates are judged; with several, see `Fitness`.
        floor: the fraction of each layer that stays at least.
        keep: names of layers that stay whole, such as `graph.unactivated`.
        start: a ranking to search on from; None starts with random ones, as the paper does.
        finalists: a second look at the best candidates; None takes the one with the lowest loss, as the paper does.
        state_folder: where the fitness of every network is noted, in a file whose name is made of all that the result
            depends on, this library's code and what the network computes included. A search found there is replayed
            from its start, without evaluating again.
        log: called with every evaluation's row of `history`, replayed ones included.

    Raises:
        UserError: the file in `state_folder` is corrupt.
    """
    search, compute = search or SearchSettings(), (compute or Compute()).resolve()
    targets = np.atleast_1d(targets).tolist()
    judge = Fitness(model, graph, data, targets, fitness or FitnessSettings(), compute, floor, search.seed, keep)
    judged: dict[str, dict[str, float]] = {}  # by what is kept: loss, accuracy and the seconds that they took
    path = None
    if state_folder is not None:
        depends_on = [tensors_digest(model.state_dict()), data.digest(), data.train.augmentation.model_dump(), targets]
        depends_on += [len(data.classes)]
        depends_on += [search.model_dump(), judge.settings.model_dump(), compute.model_dump(), floor]
        depends_on += [start and vars(start), sorted(keep)]
        computed_by = [code_digest(), source(type(data.train)), computation(model), str(graph.traced)]
        path = state_path(state_folder, "search", depends_on, computed_by, ".json")
        judged = _read(path)

    evolution = Evolution(judge.norms, search, start)
    seen: set[str] = set()
    while not evolution.done:
        began, candidate = time.perf_counter(), evolution.ask()
        networks = judge.select(candidate)
        key = tensors_digest({"kept": torch.cat([mask for kept in networks for mask in kept])})
        if key not in judged:
            judged[key] = judge(networks) | {"seconds": time.perf_counter() - began}
            if path is not None:
                write_json(path, judged)
        # A network that came before in this search costs its choice only; a replayed one, what it once cost.
        seconds = time.perf_counter() - began if key in seen else judged[key]["seconds"]
        evolution.tell(candidate, judged[key]["loss"], judged[key]["accuracy"], seconds)
        seen.add(key)
        if log:
            log(evolution.history[-1])
    history, candidates = pd.DataFrame(evolution.history), evolution.candidates
    if finalists is None and len(history) > 1 and history.loss.nunique() == 1:
        why = f"have the loss {history.loss[0]:.6g} on {len(judge.validation)} images of {len(data.classes)} classes"
        why = "cut the same network" if len(seen) == 1 else why
        warnings.warn(f"all candidates of the search {why}, so the ranking is norm-only", stacklevel=2)
        return SearchResult(Ranking.norm_only(len(judge.norms)), history, candidates)
    if finalists is None:
        return SearchResult(evolution.best, history, candidates)
    looked_at = _second_look(judge, history, candidates, finalists, state_folder)
    best = candidates[looked_at.candidate[looked_at.accuracy.idxmax()]]
    return SearchResult(best, history, candidates, looked_at)


def _second_look(
    judge: Fitness,
    history: pd.DataFrame,
    candidates: list[Ranking],
    settings: FinalistSettings,
    state_folder: str | Path | None,
) -> pd.DataFrame:
    """Train norm-only and the best candidates at every target.

    Returns:
        Columns candidate (its place in `history`), loss, accuracy (the mean over targets), seconds (of training).
    """
    looking = replace(judge, targets=settings.targets)
    fit = looking.data.fit.to(looking.compute.device)
    holdout = looking.data.holdout.to(looking.compute.device)
    norm_only = candidates.index(Ranking.norm_only(len(judge.norms)))
    rows, seen = [], set()
    for number in [norm_only, *history.loss.argsort(kind="stable")]:
        networks = looking.select(candidates[number])
        key = tensors_digest({"kept": torch.cat([mask for kept in networks for mask in kept])})
        if key in seen or len(rows) > settings.count:
            continue
        seen.add(key)
        accuracies, seconds = [], 0.0
        for kept in networks:
            small = prune(looking.model, looking.graph, kept)
            epochs = train(small, fit, settings.recipe, looking.compute, seed=looking.seed, state_folder=state_folder)
            accuracies.append(evaluate(small, holdout, looking.compute)["accuracy"])
            seconds += epochs.seconds.sum()
        rows.append((int(number), float(history.loss[number]), sum(accuracies) / len(accuracies), seconds))
    return pd.DataFrame(rows, columns=["candidate", "loss", "accuracy", "seconds"])


def _read(path: Path) -> dict[str, dict[str, float]]:
    """The networks that an interrupted search has judged."""
    try:
        noted = json.loads(path.read_bytes()) if path.exists() else {}
        return {key: {name: float(row[name]) for name in ("loss", "accuracy", "seconds")} for key, row in noted.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"search state {path} is corrupt; delete it to search from the start") from None
