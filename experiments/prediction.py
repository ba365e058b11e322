"""Which fitness predicts the fine-tuned network? One ranking, judged in every way and then fine-tuned."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt
from torch import nn

from legr.data import Dataset
from legr.errors import UserError
from legr.files import digest, write_json
from legr.fitness import Fitness, FitnessSettings, Kind
from legr.graph import Graph
from legr.ranking import Ranking
from legr.state import tensors_digest
from legr.training import Compute


class PredictionSettings(BaseModel):
    """How the fitness choices are compared: by the accuracy after a short fine-tuning."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rankings: int = Field(24, ge=3)  # how many rankings
    flops: Annotated[float, Field(gt=0, le=1)] | None = None  # of the networks, of the dense; None: the search's
    steps: PositiveInt = 200  # of fine-tuning, whose test accuracy a fitness should predict
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1,)  # of that fine-tuning; its mean counts


def judge_all(
    model: nn.Module,
    graph: Graph,
    data: Dataset,
    flops: float,
    settings: FitnessSettings,
    prediction: PredictionSettings,
    compute: Compute,
    state_folder: str | Path,
) -> Callable[[Ranking], dict[str, float]]:
    """A function of a ranking: its loss by every kind of fitness, and what they should predict.

    Its results are {loss, recalibrated, steps: held-out losses; fitted: the recalibrated loss on as many
    images that the dense network was trained on; accuracy: on the test images after `prediction.steps`
    gradient steps, mean over seeds; deviation: its standard deviation over seeds}.
    Each measurement is kept in `state_folder`, so that interrupted work continues.
    """
    settings = settings.model_copy(update={"also_at": ()})
    judges = {
        k: Fitness(model, graph, data, flops, settings.model_copy(update={"kind": k}), compute) for k in get_args(Kind)
    }
    judges["fitted"] = fitted = Fitness(
        model, graph, data, flops, settings.model_copy(update={"kind": "recalibrated"}), compute
    )
    shuffled = torch.randperm(len(data.fit), generator=torch.Generator().manual_seed(fitted.seed))
    fitted.validation = data.fit[shuffled[-len(fitted.validation) :]].load().to(compute.device)  # the first recalibrate
    longer = settings.model_copy(update={"kind": "steps", "steps": prediction.steps})
    outcomes = {seed: Fitness(model, graph, data, flops, longer, compute, seed) for seed in prediction.seeds}
    for outcome in outcomes.values():
        outcome.validation = data.test.to(compute.device)
    given = [tensors_digest(model.state_dict()), data.fingerprint, flops, settings.model_dump(exclude={"kind"})]
    given.append(compute.identity())

    def judge(ranking: Ranking) -> dict[str, float]:
        own = [*given, digest([ranking.scale, ranking.shift])]
        losses = {k: remembered(state_folder, k, own, lambda f=f: f(ranking)["loss"]) for k, f in judges.items()}
        accuracies = [
            remembered(state_folder, "tuned", [*own, prediction.steps, seed], lambda f=f: f(ranking)["accuracy"])
            for seed, f in outcomes.items()
        ]
        return losses | {"accuracy": statistics.mean(accuracies), "deviation": _deviation(accuracies)}

    return judge


def _deviation(values: list[float]) -> float:
    """The sample standard deviation; NaN for a single value."""
    return statistics.stdev(values) if len(values) > 1 else float("nan")


def remembered(folder: str | Path, name: str, key: Any, make: Callable[[], Any]) -> Any:
    """The JSON value that `make` returned for this `key`, now or in an earlier, interrupted run."""
    path = Path(folder) / f"{name}-{digest(key)}.json"
    if path.exists():
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"saved result {path} is corrupt; delete it to compute it again") from None
    value = make()
    write_json(path, value)
    return value
