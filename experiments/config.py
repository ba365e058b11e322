"""params.yaml: what it may say."""

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, get_args

import torch
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationError,
    model_validator,
)

from experiments.datasets import DataSettings
from experiments.places import Places, read_params
from experiments.prediction import PredictionSettings
from legr.errors import UserError
from legr.fitness import FitnessSettings, Kind
from legr.models import MODELS, SMALLEST_SIDE
from legr.search import SearchSettings
from legr.training import Compute, Recipe

torch.backends.cudnn.deterministic = True  # without it a GPU may pick another kernel from run to run

Target = Annotated[float, Field(gt=0, le=1)]
RANKINGS = ("legr", "legr-tau0")  # learned rankings: each has a stage, files and a colour of its own


def _with_a_point(value: Any) -> Any:
    if isinstance(value, int):
        raise ValueError("files are named after it, so it must be written with a decimal point, such as 0.47 or 1.0")
    return value


PlannedTarget = Annotated[Target, BeforeValidator(_with_a_point)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BaselineSettings(Section):
    weights: str | None = None  # "torchvision" or a file to start from; None: from random weights
    rescale: bool = False  # bring the layers of `weights` to one scale first, see pretrained.rescale
    recipe: Recipe | None = None  # None: `weights` as they are
    restart: Recipe | None = None  # trained on by this afterwards: a warm restart (Loshchilov & Hutter, ICLR 2017)
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _leads_to_a_network(self) -> "BaselineSettings":
        if self.weights is None and self.recipe is None:
            raise ValueError("it must have weights to start from, a recipe to train by, or both")
        return self


class Restart(SearchSettings):
    also_at: tuple[Target, ...] = ()  # replaces the fitness's


class Algorithm(SearchSettings):
    restart: Restart | None = None  # where `also_at` counts: searched on by this from the ranking found


class RankingSettings(Section):
    flops: Target  # the fraction at which candidates are judged
    workers: PositiveInt = 1  # processes that judge algorithm.in_flight candidates at the same time
    rankings: dict[str, Kind]  # a method's name: its fitness
    algorithm: Algorithm = Algorithm()
    fitness: FitnessSettings = FitnessSettings()

    @model_validator(mode="after")
    def _workers_have_work(self) -> "RankingSettings":
        if self.workers > self.algorithm.in_flight:
            raise ValueError(f"workers is {self.workers}; it must be at most in_flight ({self.algorithm.in_flight})")
        return self

    @model_validator(mode="after")
    def _a_race_has_one_flop_count(self) -> "RankingSettings":
        searches = [(self.algorithm.racing, self.fitness.also_at)]
        if again := self.algorithm.restart:
            searches.append((again.racing, again.also_at))
        for racing, also_at in searches:
            if racing and also_at:
                raise ValueError(f"racing is {racing}; it must be 0 where also_at has further FLOP counts to judge at")
        return self


class FinetuneSettings(Section):
    recipe: Recipe
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    recalibration_images: PositiveInt = 1500  # for the accuracy with BatchNorm re-estimated, weights untouched


class LatencySettings(Section):
    batches: tuple[PositiveInt, ...] = (1, 128)
    repetitions: PositiveInt = 20
    warmup: PositiveInt = 3


class Experiment(Section):
    """One experiment at one scale: a section of params.yaml."""

    data: DataSettings
    model: str
    compute: Compute = Compute()
    baseline: BaselineSettings
    search: RankingSettings
    finetune: FinetuneSettings
    prediction: PredictionSettings = PredictionSettings()
    latency: LatencySettings = LatencySettings()


class Plan(Section):
    """Which networks an experiment makes, at every scale."""

    learned: tuple[str, ...]  # methods with a learned ranking
    plain: tuple[str, ...]  # methods without
    targets: tuple[PlannedTarget, ...]
    contrast: dict[str, tuple[PlannedTarget, ...]] = {}  # further learned rankings, at these targets only

    @property
    def methods(self) -> tuple[str, ...]:
        return self.learned + self.plain


@dataclass(frozen=True)
class Workspace(Places):
    """An experiment's places, its settings, and which networks it makes."""

    settings: Experiment
    plan: Plan

    @property
    def networks(self) -> list[tuple[str, float]]:
        """All (method, target) of the plan."""
        grid = [(m, t) for m in self.plan.methods for t in self.plan.targets]
        return grid + [(m, t) for m, targets in self.plan.contrast.items() for t in targets]

    @property
    def caption(self) -> str:
        """Which run a figure shows."""
        s, recipe = self.settings, self.settings.finetune.recipe
        seeds = ", ".join(map(str, s.finetune.seeds))
        return f"{self.about} · fine-tuned {recipe.epochs} epochs · seeds: {seeds}"

    @property
    def about(self) -> str:
        """Scale, data and network, for captions."""
        data = self.settings.data
        shown = f"{data.name}, {data.resolution}×{data.resolution}" if data.resolution != 32 else data.name
        ten = " (10 ImageNet classes)" if data.name == "imagenette" else ""
        return f"{self.scale} scale · {shown}{ten} · {self.settings.model}"


def workspace(
    scale: str, experiment: str, results: str | None = None, overrides: dict[str, Any] | None = None
) -> Workspace:
    """Read params.yaml, found here or in a folder above, and check the experiment's settings.

    Args:
        scale: demo, laptop or paper.
        experiment: a section of that scale.
        results: another folder for all outputs, relative to the project; None is `results`.
        overrides: settings to change, such as {"finetune.recipe.epochs": 2}.
    """
    values, planned, places = read_params(scale, experiment, results)
    for dotted, value in (overrides or {}).items():
        *path, last = dotted.split(".")
        if path[:1] == ["data"]:
            raise UserError(
                f"overrides has {dotted!r}; images are prepared by the data stage: change params.yaml for them"
            )
        section = values
        for key in path:
            section = section.setdefault(key, {})
        section[last] = value
    settings = _validated(Experiment, values, f"{scale}.{experiment}")
    plan = _validated(Plan, planned, f"experiments.{experiment}")
    if settings.model not in MODELS:
        raise UserError(f"{scale}.{experiment}.model is {settings.model!r}; it must be one of {', '.join(MODELS)}")
    if settings.data.resolution < SMALLEST_SIDE[settings.model]:
        raise UserError(
            f"{scale}.{experiment}.data.resolution is {settings.data.resolution}; "
            f"{settings.model} needs at least {SMALLEST_SIDE[settings.model]} pixels"
        )
    for allowed, methods in (
        (RANKINGS, settings.search.rankings),
        (settings.search.rankings, (*plan.learned, *plan.contrast)),
        (("norm", "uniform"), plan.plain),
    ):
        if wrong := [method for method in methods if method not in allowed]:
            raise UserError(f"method is {wrong[0]!r}; here it must be one of {', '.join(allowed)}")
    return Workspace(**vars(places), settings=settings, plan=plan)


def _validated(kind: type[BaseModel], values: Any, where: str) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([where, *map(str, first["loc"])])
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[0].lower() + problem[1:]
        if first["type"] == "missing":
            raise UserError(f"params.yaml: {name} is missing") from None
        if first["type"] == "extra_forbidden":
            section = ".".join([where, *map(str, first["loc"][:-1])])
            near = get_close_matches(str(first["loc"][-1]), _settings_of(kind, first["loc"][:-1]), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"params.yaml: {name} is not a known setting of {section}{hint}") from None
        if first["type"] == "value_error" and isinstance(first["input"], dict):  # it names the setting itself
            raise UserError(f"params.yaml: {name}: {problem}") from None
        shown = first["input"] if not isinstance(first["input"], dict) else "a section"
        raise UserError(f"params.yaml: {name} is {shown!r}; {problem}") from None


def _settings_of(kind: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Names of the settings of the section at `path` below `kind`."""
    for name in path:
        annotation = kind.model_fields[str(name)].annotation
        kind = next(k for k in (annotation, *get_args(annotation)) if isinstance(k, type) and issubclass(k, BaseModel))
    return list(kind.model_fields)
