"""One experiment, opened: its settings and folders, its network and images, and what each method keeps."""

import functools
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

import legr
from experiments.data import datasets
from experiments.methods import METHODS
from experiments.settings import RankingSettings, Settings, find_root, read_settings
from legr import models
from legr.data import Dataset
from legr.files import UserError, code_digest, read_json, tensors_digest
from legr.training import Compute, Recipe


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
    _rankings: dict[tuple[str, int], legr.Ranking] = field(default_factory=dict, repr=False)

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
        out = self.state / "unfinished" if self.results == "results" else self.folder / self.stage
        out.mkdir(parents=True, exist_ok=True)
        return out

    def path(self, relative: str) -> Path:
        """A file or folder of an earlier stage: of this results folder, or else of the pipeline's."""
        path = self.folder / relative
        return path if path.exists() else self.pipelines / relative

    @property
    def prepared(self) -> Path:
        """The file of images that the data stage writes."""
        return self.root / "data" / self.scale / f"{self.name}.pt"

    @functools.cached_property
    def data(self) -> Dataset:
        return datasets.load(self.prepared, self.settings.data)

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
        """A learned method's ranking; None for the others. Read once."""
        if not METHODS[method].learned:
            return None
        if (method, trial) not in self._rankings:
            path = self.path(f"rankings/{method}/ranking-{trial}.json")
            self._rankings[method, trial] = legr.Ranking.load(path)
        return self._rankings[method, trial]

    def trials(self, method: str) -> range:
        """A method's trials."""
        ranking = self.settings.rankings.get(method)
        return range((ranking and ranking.trials) or self.settings.trials)

    def select(self, method: str, target: float, trial: int = 0) -> list[torch.Tensor]:
        """What a method keeps at the fraction `target` of the dense network's FLOPs."""
        ranking = self.ranking(method, trial)
        return METHODS[method].select(self.graph, self.norms, ranking, target, self.settings.floor)

    def network(self, method: str, target: float) -> nn.Module:
        """A method's published network: that of the first trial, in eval mode on the CPU."""
        small = legr.prune(self.model, self.graph, self.select(method, target))
        return models.load_weights(small, self.path(f"sets/{method}/{target}-0.safetensors")).eval()

    @functools.cached_property
    def networks(self) -> pd.DataFrame:
        """The records of all pruned networks: a row for each method, target and trial."""
        what = "record of a pruned network (the set stage makes it)"
        rows = []
        for method, target in itertools.product(self.methods, self.settings.targets):
            for trial in self.trials(method):
                record = read_json(self.path(f"sets/{method}/{target}-{trial}.json"), what)
                rows.append(record | {"method": method})  # one network may be that of two methods
        epochs = sorted({row["epochs"] for row in rows})
        if len(epochs) > 1:
            raise UserError(
                f"networks that are to be compared were fine-tuned for {epochs} epochs; "
                "give all methods the same (notebook 3)"
            )
        return pd.DataFrame(rows).drop(columns=["key", "made_of", "files", "widths"], errors="ignore")

    @functools.cached_property
    def cuts(self) -> pd.DataFrame:
        """What every method keeps at many FLOP counts, untrained: columns of `work.cut`, and method."""
        curves = [pd.read_csv(self.path(f"sets/{method}/cuts.csv")).assign(method=method) for method in self.methods]
        return pd.concat(curves, ignore_index=True)

    # For captions --------------------------------------------------------------------------
    @property
    def title(self) -> str:
        names = {"resnet56": "ResNet-56", "mobilenet_v2": "MobileNetV2"}
        title = datasets.DATASETS[self.settings.data.name].title
        return f"{names.get(self.settings.model, self.settings.model)} on {title}"

    @property
    def about(self) -> str:
        """Scale, data and network."""
        return f"{self.scale} scale · {datasets.about(self.settings.data)} · {self.settings.model}"

    @property
    def effort(self) -> str:
        """Fine-tuning and trials."""
        trials = "1 trial" if self.settings.trials == 1 else f"{self.settings.trials} trials"
        epochs = self.settings.finetune.recipe.epochs
        return f"fine-tuned {epochs} {'epoch' if epochs == 1 else 'epochs'} · {trials}"

    @property
    def caption(self) -> str:
        """Which run a figure shows."""
        return f"{self.about} · {self.effort}"


def in_words(recipe: Recipe) -> str:
    """A training's settings that are in force, in one line."""
    schedules = {
        "step": f"times {recipe.gamma:g} at {', '.join(f'{done:.0%}' for done in recipe.milestones)} of it",
        "exponential": f"times {recipe.gamma:g} every {recipe.every:g} epochs",
        "onecycle": f"one cycle with {recipe.warmup:.0%} warm-up",
    }
    words = [f"{recipe.epochs} epochs in batches of {recipe.batch_size}"]
    words += [f"learning rate {recipe.lr:g}, {schedules[recipe.schedule]}", f"weight decay {recipe.weight_decay:g}"]
    words += [f"{side} pixels a side until {until:.0%} of it" for until, side in recipe.resolutions]
    words += [f"label smoothing {recipe.label_smoothing:g}"] if recipe.label_smoothing else []
    words += [f"moving average of weights, {recipe.ema:g} a step"] if recipe.ema else []
    return "; ".join(words)


def judged_in_words(settings: RankingSettings) -> str:
    """How a search judges its candidates, in one line."""
    steps = f"{settings.fitness.steps} steps" if settings.fitness.steps else "no gradient step"
    judged = f"judged at {', '.join(f'{target:.0%}' for target in settings.targets)} FLOPs after {steps}"
    return f"{judged}, BatchNorm recalibrated" if settings.fitness.recalibration_images else judged


def search_in_words(settings: RankingSettings, holdout: int) -> str:
    """A search's settings; `holdout` is the number of held-out images."""
    search, images = settings.search, settings.fitness.validation_images or holdout
    start = "norm-only and its mutants" if settings.start else "random rankings"
    return (
        f"{search.evaluations} evaluations, a population of {search.population}, tournaments of {search.sample}, "
        f"{start} to begin with; the fitness is the loss on {images} held-out images, {judged_in_words(settings)}"
    )


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
