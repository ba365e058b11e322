"""What the committed runs did, the code must do again; golden.json has the numbers that it must give.

A failure means that results come out differently now. If that is meant, raise the number of their kind in
experiments/records.py, and write the expected numbers anew: python -m tests.project.test_golden
"""

import json
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file

import legr
from experiments import settings as sections
from experiments.data import datasets
from experiments.experiment import Experiment, open_experiment
from experiments.interactive import samples
from experiments.records import masks_digest
from legr import fitness as fitness_module
from legr import ranking as ranking_module
from legr.data import Augmentation, Dataset, Normalization, hold_out
from legr.files import digest
from legr.fitness import Fitness, FitnessSettings
from legr.search import Evolution
from legr.training import Compute, Recipe, evaluate, train
from tests.conftest import NAME, PHOTOS, PROJECT

EXPECTED = PROJECT / "tests/project/golden.json"
EXPERIMENTS = (NAME, PHOTOS)
SECTIONS = [kind for name, kind in vars(sections).items() if name.endswith("Settings")]
FLOAT32 = Compute(device="cpu", precision="float32")
FITNESS = {
    "as pruned": {},
    "recalibrated": {"recalibration_images": 64},
    "after steps": {"steps": 3, "lr": 0.001, "batch_size": 16},
}
RECIPES = {
    "step": {"schedule": "step"},
    "exponential": {"schedule": "exponential", "every": 1.3},
    "one-cycle": {"schedule": "onecycle"},
    "shrunk images": {"resolutions": [[0.5, 24]]},
    "moving average": {"ema": 0.8},
    "label smoothing": {"label_smoothing": 0.1},
}


@cache
def opened(name: str) -> Experiment:
    return open_experiment("laptop", name, "explore", "nowhere", root=PROJECT)


@cache
def images_of(name: str) -> Dataset:
    """The committed images: of those for training a third is held out."""
    test, train_images, _ = samples.read(opened(name))
    return Dataset(name, list("0123456789"), train_images, hold_out(train_images.labels, 86, 0), test)


def committed() -> Iterator[tuple[Experiment, str, dict]]:
    """The records of all committed networks."""
    for exp in map(opened, EXPERIMENTS):
        for method in exp.methods:
            for target in exp.settings.targets:
                for trial in exp.trials(method):
                    record = json.loads(exp.path(f"sets/{method}/{target}-{trial}.json").read_text())
                    yield exp, method, record


def right(exp: Experiment, method: str, target: float) -> int:
    """How many of the 500 committed test images a published network classifies correctly, in float32."""
    images = images_of(exp.name).test
    return round(evaluate(exp.network(method, target), images, FLOAT32)["accuracy"] * len(images))


def losses_by_fitness(name: str) -> dict[str, float]:
    """The loss of the first trial's ranking by each kind of fitness."""
    exp, target, found = opened(name), 0.9, {}
    for kind, values in FITNESS.items():
        fitness = Fitness(
            exp.model, exp.graph, images_of(name), [target], FitnessSettings(**values), FLOAT32, exp.settings.floor
        )
        found[kind] = fitness(fitness.select(exp.ranking("legr", 0)))["loss"]
    return found


def trainings(name: str) -> dict[str, list[float]]:
    """The loss of a short training of a published network by each kind of recipe, and its weights' squared norm.

    Rates are low, so that rounding does not grow; weight decay is strong, so that it is seen all the same.
    """
    exp, images, found = opened(name), images_of(name), {}
    for kind, values in RECIPES.items():
        network = exp.network("norm", 0.7)
        recipe = Recipe(**{"epochs": 2, "batch_size": 16, "lr": 0.001, "weight_decay": 0.05} | values)
        history = train(network, images.fit[torch.arange(0, 170, 4)], recipe, FLOAT32, seed=1)
        norm = sum(p.detach().double().square().sum().item() for p in network.parameters() if p.dim() > 1)
        found[kind] = [history.train_loss.iloc[-1], norm]
    return found


def held_out() -> list[str]:
    """The hold-out split of both data sets, whose images are sorted by class."""
    counts = ([5000] * 10, [963, 955, 993, 858, 941, 956, 961, 931, 951, 960])
    labels = [torch.arange(10).repeat_interleave(torch.tensor(each)) for each in counts]
    return [digest(hold_out(each, count, 0).tolist()) for each, count in zip(labels, (2500, 1000), strict=True)]


def prepared_folder(folder) -> str:
    """The images that the data stage makes of a folder of six pictures."""
    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for label, shape in enumerate(((40, 30, 3), (24, 24, 3), (16, 50, 3))):
            path = folder / split / f"class{label % 2}" / f"{label}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8)).save(path)
    wanted = sections.DataSettings(name="folder", folder=str(folder), resolution=[24, 20], holdout=1)
    datasets.prepare(wanted, folder, folder / "images.pt")
    return datasets.load(folder / "images.pt", wanted).digest()


def defaults() -> dict[str, dict]:
    """Settings that are left out of keys, since they are as by default."""
    return {
        kind.__name__: {
            name: json.loads(json.dumps(field.get_default(call_default_factory=True), default=str))
            for name, field in kind.model_fields.items()
            if not field.is_required()
        }
        for kind in (Recipe, Compute, Augmentation, Normalization, *SECTIONS)
    }


# What is compared -------------------------------------------------------------------------


def expected() -> dict:
    return json.loads(EXPECTED.read_text())


def check_searches(name: str) -> None:
    """Told the committed losses, a search asks for the committed candidates."""
    exp = opened(name)
    for method, settings in exp.settings.rankings.items():
        start = legr.Ranking.norm_only(len(exp.norms)) if settings.start == "norm" else None
        for trial in exp.trials(method):
            maps = load_file(exp.path(f"rankings/{method}/candidates-{trial}.safetensors"))
            evolution = Evolution(exp.norms, settings.search.model_copy(update={"seed": trial}), start)
            for i, row in enumerate(pd.read_csv(exp.path(f"rankings/{method}/search-{trial}.csv")).itertuples()):
                candidate = evolution.ask()
                assert np.allclose(candidate.scale, maps["scale"][i], rtol=1e-12, atol=0)  # exp rounds by processor
                assert np.allclose(candidate.shift, maps["shift"][i], rtol=1e-6, atol=1e-6)
                evolution.tell(candidate, row.loss, row.accuracy)
            assert evolution.done
            best = evolution.best
            if settings.finalists:
                finalists = pd.read_csv(exp.path(f"rankings/{method}/finalists-{trial}.csv"))
                best = evolution.candidates[finalists.candidate[finalists.accuracy.idxmax()]]
            assert np.allclose(best.scale, exp.ranking(method, trial).scale, rtol=1e-12, atol=0)


def check_networks(name: str) -> None:
    """The committed dense network and rankings make the committed networks, to the filter."""
    for exp, method, record in committed():
        if exp.name != name:
            continue
        kept = exp.select(method, record["target"], record["trial"])
        assert masks_digest(kept) == record["made_of"]["inputs"]["masks"], record
        assert [int(mask.sum()) for mask in kept] == record["widths"]
        assert (exp.graph.flops(kept), exp.graph.params(kept)) == (record["flops"], record["params"])


def check_fitness(name: str) -> None:
    assert losses_by_fitness(name) == pytest.approx(expected()["fitness"][name], rel=1e-3)


def check_trainings(name: str) -> None:
    wanted = expected()["training"][name]
    for kind, (loss, norm) in trainings(name).items():
        assert loss == pytest.approx(wanted[kind][0], rel=1e-2), kind
        assert norm == pytest.approx(wanted[kind][1], rel=1e-6), kind  # twice the weight decay moves it by more


CHECKS = [(check, name) for check in (check_searches, check_networks, check_fitness) for name in EXPERIMENTS]
LONG = pytest.param(check_trainings, PHOTOS, marks=pytest.mark.slow)


@pytest.mark.parametrize(("check", "name"), [*CHECKS, (check_trainings, NAME), LONG])
def test_the_code_gives_what_it_gave(check: Callable[[str], None], name: str):
    check(name)


def test_the_hold_out_split_is_the_same():
    assert held_out() == expected()["holdout"]


def test_defaults_are_the_same():
    """Keys leave out what is as by default, so another default changes what a key means. A new setting does not."""
    now = defaults()
    for kind, wanted in expected()["defaults"].items():
        assert {name: now[kind].get(name) for name in wanted} == wanted


def test_a_folder_is_read_as_it_was(tmp_path):
    assert prepared_folder(tmp_path) == expected()["folder"]


PUBLISHED = [(name, target) for name in EXPERIMENTS for target in opened(name).settings.targets]


@pytest.mark.parametrize(
    ("name", "target"),
    [pytest.param(*pair, marks=[] if pair == (NAME, 0.7) else pytest.mark.slow) for pair in PUBLISHED],
)
def test_the_published_networks_classify_the_committed_images_as_they_did(name, target):
    exp, wanted = opened(name), expected()["right"][name]
    for method in exp.methods:
        assert abs(right(exp, method, target) - wanted[f"{method} {target}"]) <= 1, method


def twice_the_decay(self, model):
    optimizer = OPTIMIZER(self, model)
    optimizer.param_groups[0]["weight_decay"] *= 2
    return optimizer


def one_mutation_more(self, parent, i):
    return MUTANT(self, MUTANT(self, parent, i), i)


def higher_floor(graph, order, floor, keep):
    return DROPPABLE(graph, order, floor + 0.05, keep)


DROPPABLE = ranking_module._droppable
OPTIMIZER, MUTANT, RATE, CALL = Recipe.optimizer, Evolution._mutant, Recipe.learning_rate, Normalization.__call__
CHANGES = {
    "weight decay": (Recipe, "optimizer", twice_the_decay, check_trainings),
    "schedule": (Recipe, "learning_rate", lambda self, done: 0.99 * RATE(self, done), check_trainings),
    "mutation": (Evolution, "_mutant", one_mutation_more, check_searches),
    "floor": (ranking_module, "_droppable", higher_floor, check_networks),
    "normalization": (Normalization, "__call__", lambda self, pixels: CALL(self, pixels) + 0.1, check_fitness),
    "recalibration": (fitness_module, "recalibrate", lambda *_: None, check_fitness),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_what_comes_out_is_seen(monkeypatch, change, name):
    target, attribute, value, check = CHANGES[change]
    monkeypatch.setattr(target, attribute, value)
    with pytest.raises(AssertionError):
        check(name)


def write() -> None:
    """Write golden.json."""
    import tempfile
    from pathlib import Path

    names = {name: opened(name) for name in EXPERIMENTS}
    golden = {
        "defaults": defaults(),
        "holdout": held_out(),
        "fitness": {name: losses_by_fitness(name) for name in names},
        "training": {name: trainings(name) for name in names},
        "right": {
            name: {f"{m} {t}": right(exp, m, t) for m in exp.methods for t in exp.settings.targets}
            for name, exp in names.items()
        },
    }
    with tempfile.TemporaryDirectory() as folder:
        golden["folder"] = prepared_folder(Path(folder))
    EXPECTED.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    write()
