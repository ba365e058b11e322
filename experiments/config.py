"""params.yaml and folders: what an experiment may say, and `open_experiment`, with which every notebook begins."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import yaml
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, model_validator
from torch import nn

import legr
from experiments import datasets
from experiments.methods import METHODS
from legr import models
from legr.data import Dataset
from legr.files import Settings as Section
from legr.files import UserError, code_digest, read_json, tensors_digest
from legr.fitness import FitnessSettings
from legr.ranking import FLOOR
from legr.search import FinalistSettings, SearchSettings
from legr.training import Compute, Recipe

Target = Annotated[float, Field(gt=0, le=1)]  # a fraction of the dense network's FLOPs


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

    rankings: int = Field(24, ge=3)  # norm-only, random ones, and candidates of the searches
    targets: Annotated[tuple[Target, ...], Field(min_length=1)]  # where the fitness is compared
    steps: PositiveInt = 200  # of fine-tuning
    lr: float = Field(0.01, gt=0)
    batch_size: PositiveInt = 64
    recalibration_images: NonNegativeInt = 0  # after the steps, as in a fitness
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (1,)
    fitness: dict[str, FitnessSettings]  # a name for figures: what is measured
    search: RankingSettings  # of which `vary` changes one setting at a time
    vary: Annotated[dict[str, tuple[Any, ...]], Field(min_length=1)]  # values of "targets", "fitness.steps", ...
    evaluations: tuple[PositiveInt, ...] = ()  # the methods' searches, stopped after so many

    @model_validator(mode="after")
    def _are_searches(self) -> "AblationSettings":
        return self.variants and self

    @functools.cached_property
    def variants(self) -> dict[tuple[str, str], RankingSettings]:
        """Searches by what they change and to what."""
        found = {}
        for dotted, values in self.vary.items():
            for value in values:
                changed = self.search.model_dump()
                try:
                    override(changed, dotted, value)
                    variant = RankingSettings.model_validate(changed)
                except (AttributeError, TypeError, ValidationError):
                    what = "it must be a value of a search's setting, such as fitness.steps"
                    raise ValueError(f"vary has {dotted}: {value!r}; {what}") from None
                shown = [f"{x:.0%}" if isinstance(x, float) else str(x) for x in np.atleast_1d(value).tolist()]
                found[dotted, ", ".join(shown)] = variant
        return found


class LatencySettings(Section):
    batches: tuple[PositiveInt, ...] = (1, 128)
    repetitions: PositiveInt = 20


class Settings(Section):
    """One experiment at one scale: a section of params.yaml."""

    data: datasets.DataSettings
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
        where, problem = ".".join([*within, *map(str, first["loc"])]), first["msg"].removeprefix("Value error, ")
        shown = where if isinstance(first["input"], dict) else f"{where} is {first['input']!r}"
        raise UserError(f"{file}{f'{shown}: ' * bool(shown)}{problem[0].lower()}{problem[1:]}") from None


def find_root() -> Path:
    here = Path.cwd()
    root = next((p for p in (here, *here.parents) if (p / "params.yaml").is_file()), None)
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
    if settings.model not in models.MODELS:
        raise UserError(f"{scale}.{name}.model is {settings.model!r}; it must be one of {', '.join(models.MODELS)}")
    for method in [*methods, *settings.rankings]:
        if method not in METHODS:
            raise UserError(f"params.yaml: method is {method!r}; it must be one of {', '.join(METHODS)}")
        if METHODS[method].learned and method not in settings.rankings:
            raise UserError(f"params.yaml: {scale}.{name}.rankings lacks {method}, which is a learned method")
    rankings = {name: ranking for name, ranking in settings.rankings.items() if name in methods}
    return settings.model_copy(update={"rankings": rankings}), methods


def code() -> str:
    """Names the code that runs, of library and experiments."""
    return code_digest(Path(legr.__file__).parent, Path(__file__).parent)


def check_code(root: Path) -> None:
    """Raise UserError if what was imported is not the code of the project's folder."""
    for path in (Path(legr.__file__).parent, Path(__file__).parent):
        if path.resolve() != (root / path.name).resolve():
            raise UserError(
                f"results is 'results', which only the code in {root} may write, and {path.name} was imported from "
                f"{path.parent}; start with python -m experiments (or dvc repro) in {root}, or set PYTHONPATH to it"
            )


@dataclass(frozen=True, eq=False)
class Experiment:
    """An experiment at one scale, its folders, and what a stage of it starts from. Made by `open_experiment`."""

    scale: str
    name: str
    stage: str  # the stage's folder below results/<scale>/<experiment>/, such as "sets/legr"
    results: str  # "results" (the pipeline's), or another folder to play in
    overrides: dict[str, Any]
    root: Path
    settings: Settings
    methods: list[str]

    @property
    def folder(self) -> Path:
        return self.root / self.results / self.scale / self.name

    @property
    def pipelines(self) -> Path:
        """The experiment's folder of the pipeline's results."""
        return self.root / "results" / self.scale / self.name

    @property
    def state(self) -> Path:
        """What an interrupted stage resumes from."""
        return self.root / ".state" / self.results / self.scale / self.name / self.stage

    @property
    def out(self) -> Path:
        """Where the stage writes, made here. The pipeline swaps it in when the notebook has run to its end."""
        out = self.state / "part" if self.results == "results" else self.folder / self.stage
        out.mkdir(parents=True, exist_ok=True)
        return out

    def path(self, relative: str) -> Path:
        """A file or folder of an earlier stage: of this results folder, or else of the pipeline's."""
        own = self.folder / relative
        return own if own.exists() else self.pipelines / relative

    @property
    def images(self) -> Path:
        return self.root / "data" / self.scale / f"{self.name}.pt"

    @functools.cached_property
    def data(self) -> Dataset:
        return datasets.load(self.images, self.settings.data)

    @functools.cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of the images and of the dense network, for keys."""
        return {"images": self.data.digest(), "dense": tensors_digest(self.model.state_dict())}

    @functools.cached_property
    def compute(self) -> Compute:
        return self.settings.compute.resolve()

    @functools.cached_property
    def dense(self) -> dict[str, Any]:
        """The record of the dense network."""
        return read_json(self.path("dense/dense.json"), "record of the dense network (the dense stage makes it)")

    @functools.cached_property
    def model(self) -> nn.Module:
        """The dense network, on the CPU in eval mode."""
        path = self.path("dense/network.safetensors")
        state = models.read_weights(path)
        outputs = [len(tensor) for tensor in state.values() if tensor.dim() == 2]
        if not outputs:
            raise UserError(f"{path} is not the dense network's file (no classifier); the dense stage makes it")
        return models.fill(models.build(self.settings.model, outputs[-1], 0), state, path).eval()

    @functools.cached_property
    def graph(self) -> legr.Graph:
        return legr.trace(self.model, self.example, check=False)  # the dense stage has checked it

    @functools.cached_property
    def norms(self) -> list[torch.Tensor]:
        return legr.filter_norms(self.model, self.graph)

    @property
    def example(self) -> torch.Tensor:
        return torch.zeros(1, *self.settings.data.shape)

    def ranking(self, method: str, trial: int) -> legr.Ranking | None:
        """A learned method's ranking; None for the others."""
        if not METHODS[method].learned:
            return None
        return legr.Ranking.load(self.path(f"rankings/{method}/ranking-{trial}.json"))

    def trials(self, method: str) -> range:
        """A method's trials."""
        ranking = self.settings.rankings.get(method)
        return range((ranking and ranking.trials) or self.settings.trials)

    def select(self, method: str, target: float, trial: int = 0) -> list[torch.Tensor]:
        """What a method keeps at the fraction `target` of the dense network's FLOPs."""
        ranking = self.ranking(method, trial)
        return METHODS[method].select(self.graph, self.norms, ranking, target, self.settings.floor)

    # For captions --------------------------------------------------------------------------
    @property
    def title(self) -> str:
        names = {"resnet56": "ResNet-56", "mobilenet_v2": "MobileNetV2"}
        return f"{names.get(self.settings.model, self.settings.model)} on {self.settings.data.title}"

    @property
    def about(self) -> str:
        """Scale, data and network."""
        data = self.settings.data
        return f"{self.scale} scale · {data.about} · {self.settings.model}"

    @property
    def effort(self) -> str:
        """Fine-tuning and trials."""
        trials = f"{self.settings.trials} trial{'s' * (self.settings.trials > 1)}"
        return f"fine-tuned {self.settings.finetune.recipe.epochs} epochs · {trials}"

    @property
    def caption(self) -> str:
        """Which run a figure shows."""
        return f"{self.about} · {self.effort}"


def open_experiment(
    scale: str,
    experiment: str,
    stage: str,
    results: str = "playground",
    overrides: dict[str, Any] | None = None,
    root: Path | None = None,
) -> Experiment:
    """Read params.yaml, found here or in a folder above, and check the experiment's settings.

    Args:
        scale: demo, laptop, gpu or paper.
        experiment: a section of that scale.
        stage: where this notebook writes, below the experiment's folder.
        results: "results" is the pipeline's; another folder is to play in, and what it lacks is read from there.
        overrides: settings to change, such as {"finetune.recipe.epochs": 2}.
        root: the project; None looks for it here and in the folders above.

    Raises:
        UserError: settings are wrong; the images have changed since they were read; or `results` is the pipeline's and
            the code that runs is not this project's.
    """
    root = root or find_root()
    if results == "results":
        check_code(root)
    settings, methods = read_settings(root, scale, experiment, overrides)
    datasets.check_unchanged(settings.data, root / f"data/{scale}/{experiment}.pt")
    return Experiment(scale, experiment, stage, results, overrides or {}, root, settings, methods)
