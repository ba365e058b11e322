"""params.yaml: what it may say, and where things lie."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, get_args

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

import legr
from experiments.datasets import DataSettings
from experiments.prediction import PredictionSettings
from legr.errors import UserError
from legr.files import digest
from legr.fitness import FitnessSettings, Kind
from legr.models import MODELS
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
    recipe: Recipe
    restart: Recipe | None = None  # trained on by this afterwards: a warm restart (Loshchilov & Hutter, ICLR 2017)
    seed: NonNegativeInt = 0


class RankingSettings(Section):
    flops: Target  # the fraction at which candidates are judged
    rankings: dict[str, Kind]  # a method's name: its fitness
    algorithm: SearchSettings = SearchSettings()
    fitness: FitnessSettings = FitnessSettings()


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


def code_digest() -> str:
    """Names the state of interrupted work by the library's code: other code must not go on with it."""
    return digest([path.read_text(encoding="utf-8") for path in sorted(Path(legr.__file__).parent.glob("*.py"))])


@dataclass(frozen=True)
class Workspace:
    """One experiment's settings, and the place of everything that it reads and writes."""

    scale: str
    name: str
    settings: Experiment
    plan: Plan
    root: Path
    results_root: Path

    @property
    def results(self) -> Path:
        return self.results_root / self.scale / self.name

    @property
    def figures(self) -> Path:
        return self.results / "figures"

    @property
    def baseline(self) -> Path:
        """The dense network's weights; small enough for git, so that a clone has what all else starts from."""
        return self.results / "baseline.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Beside results/ as checkpoints/; within any other results folder."""
        base = self.root if self.results_root == self.root / "results" else self.results_root
        return base / "checkpoints" / self.scale / self.name

    @property
    def images(self) -> Path:
        return self.root / "data" / self.scale / f"{self.name}.safetensors"

    @property
    def state(self) -> Path:
        """Where interrupted work resumes from; the pipeline gives each stage its own and clears it at the end."""
        return Path(os.environ.get("LEGR_STATE") or self.root / ".state" / "by-hand" / code_digest())

    def ranking(self, method: str) -> Path:
        return self.results / f"ranking{method.removeprefix('legr')}.json"

    def search(self, method: str) -> Path:
        return self.results / f"search{method.removeprefix('legr')}.csv"

    def candidates(self, method: str) -> Path:
        """Every (α, κ) that the search tried: tensors scale and shift [evaluations, layers]."""
        return self.results / f"candidates{method.removeprefix('legr')}.safetensors"

    def network(self, method: str, target: float) -> Path:
        """The rows about one pruned network, one per seed."""
        return self.results / "networks" / f"{method}-{target}.json"

    def weights(self, method: str, target: float, seed: int) -> Path:
        return self.checkpoints / f"{method}-{target}" / f"seed{seed}.safetensors"

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
        return f"{self.scale} scale · {s.data.name} · {s.model} · fine-tuned {recipe.epochs} epochs · seeds: {seeds}"


def workspace(
    scale: str, experiment: str, results: str | None = None, overrides: dict[str, Any] | None = None
) -> Workspace:
    """Read params.yaml, found here or in a folder above.

    Args:
        scale: demo, laptop or paper.
        experiment: a section of that scale.
        results: another folder for all outputs, relative to the project; None is `results`.
        overrides: settings to change, such as {"finetune.recipe.epochs": 2}.
    """
    here = Path.cwd()
    root = next((p for p in (here, *here.parents) if (p / "params.yaml").is_file()), None)
    if root is None:
        raise UserError(f"params.yaml was not found in {here} or a folder above it; run from inside the project")
    try:
        params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
        plans = params.pop("experiments")
        params.pop("scale", None)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"params.yaml can't be read: {' '.join(str(error).split())}") from None
    if scale not in params:
        raise UserError(f"scale is {scale!r}; it must be one of {', '.join(params)}")
    if experiment not in params[scale]:
        raise UserError(f"experiment is {experiment!r}; scale {scale} has {', '.join(params[scale])}")
    values = params[scale][experiment]
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
    plan = _validated(Plan, plans.get(experiment, {}), f"experiments.{experiment}")
    if settings.model not in MODELS:
        raise UserError(f"{scale}.{experiment}.model is {settings.model!r}; it must be one of {', '.join(MODELS)}")
    for allowed, methods in (
        (RANKINGS, settings.search.rankings),
        (settings.search.rankings, (*plan.learned, *plan.contrast)),
        (("norm", "uniform"), plan.plain),
    ):
        if wrong := [method for method in methods if method not in allowed]:
            raise UserError(f"method is {wrong[0]!r}; here it must be one of {', '.join(allowed)}")
    return Workspace(scale, experiment, settings, plan, root, root / (results or "results"))


def _validated(kind: type[BaseModel], values: Any, where: str) -> Any:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([where, *map(str, first["loc"])])
        problem = first["msg"][0].lower() + first["msg"][1:]
        if first["type"] == "missing":
            raise UserError(f"params.yaml: {name} is missing") from None
        if first["type"] == "extra_forbidden":
            section = ".".join([where, *map(str, first["loc"][:-1])])
            near = get_close_matches(str(first["loc"][-1]), _settings_of(kind, first["loc"][:-1]), 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"params.yaml: {name} is not a known setting of {section}{hint}") from None
        shown = first["input"] if not isinstance(first["input"], dict) else "a section"
        raise UserError(f"params.yaml: {name} is {shown!r}; {problem}") from None


def _settings_of(kind: type[BaseModel], path: Sequence[str | int]) -> list[str]:
    """Names of the settings of the section at `path` below `kind`."""
    for name in path:
        annotation = kind.model_fields[str(name)].annotation
        kind = next(k for k in (annotation, *get_args(annotation)) if isinstance(k, type) and issubclass(k, BaseModel))
    return list(kind.model_fields)
