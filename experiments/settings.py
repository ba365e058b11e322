"""All that params.yaml may say: a section of it is a class here, or one of the library's that is imported here."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator

from experiments.methods import METHODS
from legr import models
from legr.data import Augmentation, Normalization
from legr.files import Settings as Section
from legr.files import UserError
from legr.fitness import FitnessSettings
from legr.ranking import FLOOR
from legr.search import FinalistSettings, SearchSettings
from legr.training import Compute, Recipe

DataSet = Literal["digits", "cifar10", "imagenette", "imagenet", "folder"]
Target = Annotated[float, Field(gt=0, le=1)]  # a fraction of the dense network's FLOPs


class DataSettings(Section):
    """Which images an experiment uses; `folder` (or LEGR_<NAME> in the environment) replaces the download."""

    name: DataSet
    resolution: PositiveInt | tuple[PositiveInt, PositiveInt] = 32  # pixels: a side, or height and width
    normalization: Normalization = Normalization()  # of the network's inputs: imagenet, none, raw, or mean and std
    holdout: PositiveInt  # training images kept from the dense network, on which the search judges
    folder: str | None = None  # has train/<class>/ and test/<class>/ (or val/, valid/)
    stream: bool = False  # decode in every epoch instead of once into memory
    seed: NonNegativeInt = 0  # of the held-out images
    augmentation: Augmentation = Augmentation()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""
        sides = self.resolution if isinstance(self.resolution, tuple) else (self.resolution,) * 2
        return 3, *sides


class DenseSettings(Section):
    weights: str | None = None  # "torchvision" or a file to start from; None: from random weights
    rescale: bool = False  # bring the layers of `weights` to one scale first, see pretrained.rescale
    recipes: tuple[Recipe, ...] = ()  # trained by these, one after the other; none: `weights` as they are
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _leads_to_a_network(self) -> "DenseSettings":
        if self.weights is None and not self.recipes:
            raise ValueError("it must have weights to start from, recipes to train by, or both")
        return self


class RankingSettings(Section):
    """How a learned method finds its ranking."""

    targets: Annotated[tuple[Target, ...], Field(min_length=1)]  # where candidates are judged; several: their mean
    start: Literal["norm"] | None = None  # "norm": search on from norm-only; None: from random rankings
    trials: PositiveInt | None = None  # None: as many as the experiment's
    search: SearchSettings = SearchSettings()
    fitness: FitnessSettings = FitnessSettings()
    finalists: FinalistSettings | None = None  # a second look at the best candidates


class FinetuneSettings(Section):
    recipe: Recipe
    recalibration_images: PositiveInt = 1500  # for the accuracy with BatchNorm re-estimated, weights untouched


class CutSettings(Section):
    """How often a method's ranking is cut between the lowest target and all FLOPs, for a curve without training."""

    number: int = Field(100, ge=2)
    test_images: PositiveInt = 2000  # not all of them, since many networks are tested


class AblationSettings(Section):
    """Which fitness predicts the accuracy after a short fine-tuning, and what else a search depends on."""

    rankings: int = Field(24, ge=3)  # norm-only, random ones, and candidates of `candidates`
    candidates: Annotated[dict[str, RankingSettings], Field(min_length=1)]  # a name for figures: a search
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]  # where the fitness is compared
    steps: PositiveInt = 200  # of fine-tuning
    lr: float = Field(0.01, gt=0)
    batch_size: PositiveInt = 64
    recalibration_images: NonNegativeInt = 0  # after the steps, as in a fitness
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1,)
    fitness: dict[str, FitnessSettings]  # a name for figures: what is measured
    search: RankingSettings | None = None  # of which `vary` changes one setting at a time
    vary: dict[str, tuple[Any, ...]] = Field(default_factory=dict)  # values of "targets", "fitness.steps", ...

    @model_validator(mode="after")
    def _are_searches(self) -> "AblationSettings":
        if self.vary and not self.search:
            raise ValueError("vary changes one setting at a time of search, which is not there")
        _ = self.variants  # raises where a name is no setting of a search
        return self

    @functools.cached_property
    def variants(self) -> dict[tuple[str, str], RankingSettings]:
        """Searches by what they change and to what."""
        variants = {}
        for dotted, values in self.vary.items():
            for value in values:
                changed = self.search.model_dump()
                try:
                    override(changed, dotted, value)
                    variant = RankingSettings.model_validate(changed)
                except (AttributeError, TypeError, ValidationError):
                    allowed = "it must be a value of a search's setting, such as fitness.steps"
                    raise ValueError(f"vary has {dotted}: {value!r}; {allowed}") from None
                values = value if isinstance(value, list | tuple) else [value]
                answer = ", ".join(f"{one:.0%}" if isinstance(one, float) else str(one) for one in values)
                variants[dotted, answer] = variant
        return variants


class LatencySettings(Section):
    batches: tuple[PositiveInt, ...] = (1, 128)
    repetitions: PositiveInt = 20


class Settings(Section):
    """One experiment at one scale: a section of params.yaml."""

    data: DataSettings
    model: str
    compute: Compute = Compute()
    workers: PositiveInt | str = 1  # processes for independent work, or the address of a Dask scheduler
    trials: PositiveInt = 1  # each with a search and a fine-tuning of its own
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]
    floor: Annotated[float, Field(ge=0, lt=1)] = FLOOR
    dense: DenseSettings
    rankings: dict[str, RankingSettings]
    finetune: FinetuneSettings
    cuts: CutSettings = CutSettings()
    ablations: AblationSettings
    latency: LatencySettings = LatencySettings()


def override(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set what a dotted name such as "fitness.steps" means in nested dictionaries."""
    *path, last = dotted.split(".")
    functools.reduce(lambda section, key: section.setdefault(key, {}), path, values)[last] = value


@contextmanager
def in_one_sentence(file: str = "", *within: str) -> Iterator[None]:
    """Settings that are refused are a UserError: the first one's dotted name, its value and what is allowed."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join([*within, *map(str, first["loc"])])
        problem = first["msg"].removeprefix("Value error, ")
        problem = problem[0].lower() + problem[1:]
        if not isinstance(first["input"], dict):
            problem = f"{name} is {first['input']!r}: {problem}"
        elif name:
            problem = f"{name}: {problem}"
        raise UserError(f"{file}{problem}") from None


def find_root() -> Path:
    """The project in which we are; outside of any, that of this code."""
    here = Path.cwd()
    root = next((p for p in (here, *here.parents, Path(__file__).parents[1]) if (p / "params.yaml").is_file()), None)
    if root is None:
        raise UserError(f"params.yaml was not found in {here} or a folder above it; run from inside the project")
    return root


def read_settings(
    root: Path, scale: str, name: str, overrides: dict[str, Any] | None = None
) -> tuple[Settings, list[str]]:
    """The settings of an experiment, and the names of the methods."""
    try:
        params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
        methods = [method for group in params.pop("methods").values() for method in group]
        params.pop("scale", None)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"params.yaml can't be read: {' '.join(str(error).split())}") from None
    if scale not in params:
        raise UserError(f"scale is {scale!r}; it must be one of {', '.join(params)}")
    if name not in (params[scale] or {}):
        raise UserError(f"experiment is {name!r}; scale {scale} has {', '.join(params[scale] or ['none'])}")
    values = params[scale][name]
    for dotted, value in (overrides or {}).items():
        if dotted.startswith("data."):
            raise UserError(f"overrides has {dotted!r}; images are prepared by the data stage: change params.yaml")
        try:
            override(values, dotted, value)
        except (AttributeError, TypeError):
            what = "it must name settings of sections, such as 'finetune.recipe.lr'"
            raise UserError(f"overrides has {dotted!r}; {what}") from None
    with in_one_sentence("params.yaml: ", scale, name):
        settings = Settings.model_validate(values)
    _check_names(settings, methods, f"{scale}.{name}")
    rankings = {name: ranking for name, ranking in settings.rankings.items() if name in methods}
    return settings.model_copy(update={"rankings": rankings}), methods


def _check_names(settings: Settings, methods: list[str], section: str) -> None:
    """Raise UserError where the model or a method is unknown, or a learned method has no ranking."""
    if settings.model not in models.MODELS:
        raise UserError(f"{section}.model is {settings.model!r}; it must be one of {', '.join(models.MODELS)}")
    for method in [*methods, *settings.rankings]:
        if method not in METHODS:
            raise UserError(f"params.yaml: method is {method!r}; it must be one of {', '.join(METHODS)}")
        if METHODS[method].learned and method not in settings.rankings:
            raise UserError(f"params.yaml: {section}.rankings lacks {method}, which is a learned method")
