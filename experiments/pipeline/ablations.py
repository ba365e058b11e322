"""The ablations: which fitness predicts a fine-tuned network's accuracy, and what else a search depends on."""

import functools
import statistics
from typing import Any

import numpy as np
import pandas as pd

import legr
from experiments.experiment import Experiment, search_in_words
from experiments.pipeline import jobs, work
from experiments.records import PACKED, as_written, made_of, masks_digest, measure, measurements, once, pack
from experiments.settings import RankingSettings
from legr.files import write_text
from legr.fitness import Fitness, FitnessSettings, Masks


@functools.lru_cache(maxsize=64)
def _fitness(
    exp: Experiment, settings: FitnessSettings, target: float, seed: int = 0, on_test_images: bool = False
) -> Fitness:
    fitness = Fitness(exp.model, exp.graph, exp.data, [target], settings, exp.compute, exp.settings.floor, seed)
    if on_test_images:
        fitness.validation = exp.data.test.to(exp.compute.device)
    return fitness


def fitness_made_of(exp: Experiment, what: str, settings: FitnessSettings, kept: Masks, seed: int) -> dict[str, Any]:
    """`what` is measured: a loss on held-out images, or an accuracy on test images."""
    inputs = exp.inputs | {"masks": masks_digest(kept)}
    settings = {"what": what, "fitness": as_written(settings)} | as_written(exp.settings, work.AUGMENTATION)
    return made_of(exp, "measurement", settings, inputs, seed)


def fitness_of(exp: Experiment, ranking: legr.Ranking, target: float, settings: FitnessSettings) -> float:
    """A ranking's loss on held-out images by a fitness."""
    fitness = _fitness(exp, settings, target)
    (kept,) = fitness.select(ranking)
    wanted = fitness_made_of(exp, "loss on held-out images", settings, kept, 0)
    return measure(exp, wanted, lambda: {"loss": fitness([kept])["loss"]})["loss"]


def accuracies_after_steps(exp: Experiment, ranking: legr.Ranking, target: float) -> list[float]:
    """What a fitness should predict: test accuracy after some steps of fine-tuning, with each seed."""
    settings, accuracies = exp.settings.ablations, []
    steps = FitnessSettings(**settings.model_dump(include=set(FitnessSettings.model_fields)))
    for seed in settings.seeds:
        fitness = _fitness(exp, steps, target, seed, on_test_images=True)
        (kept,) = fitness.select(ranking)
        wanted = fitness_made_of(exp, "accuracy on test images", steps, kept, seed)
        record = measure(exp, wanted, lambda fitness=fitness, kept=kept: {"accuracy": fitness([kept])["accuracy"]})
        accuracies.append(record["accuracy"])
    return accuracies


def ablations_made_of(exp: Experiment) -> dict[str, Any]:
    settings = as_written(exp.settings, {"ablations": True, "floor": True, "targets": True} | work.AUGMENTATION)
    return made_of(exp, "measurement", settings, exp.inputs)


def ablate(exp: Experiment) -> dict[str, Any]:
    """Make fitness.csv (rankings judged by each fitness) and searches.csv (what searches with other settings find).

    searches.csv is made only where `vary` asks for searches.
    """
    return once(exp, "ablations", ablations_made_of(exp), lambda: _ablate(exp))


def _ablate(exp: Experiment) -> dict[str, Any]:
    settings = exp.settings.ablations
    rankings = [(source, ranking, t) for t in settings.targets for source, ranking in rankings_to_measure(exp)]
    table = pd.DataFrame(jobs.run(exp, compare_fitness, [each[1:] for each in rankings], "rankings"))
    table = table.assign(source=[source for source, _, _ in rankings], target=[t for _, _, t in rankings])
    tables = {"fitness.csv": table}
    if settings.vary:
        tables["searches.csv"] = pd.concat(jobs.run(exp, try_search, searches_to_try(exp), "searches"))
    for name, rows in tables.items():
        write_text(exp.state / name, rows.to_csv(index=False))
    seconds = sum(record["seconds"] or 0 for record in measurements(exp.out))
    pack(exp, exp.state)
    return {"files": [*tables, PACKED], "seconds": seconds}


def compare_fitness(exp: Experiment, ranking: legr.Ranking, target: float) -> dict[str, float]:
    """A ranking's loss by each fitness of the ablation, and the mean and deviation of `accuracies_after_steps`."""
    fitness = exp.settings.ablations.fitness
    row = {name: fitness_of(exp, ranking, target, settings) for name, settings in fitness.items()}
    accuracies = accuracies_after_steps(exp, ranking, target)
    row["accuracy"] = statistics.mean(accuracies)
    row["deviation"] = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
    return row


def searches_to_try(exp: Experiment) -> list[tuple[str, str, int]]:
    """The questions of the ablation, with their answers and the searches of each; norm-only belongs to all of them."""
    settings = exp.settings.ablations
    trials = range(settings.search.trials or 1)
    return [("", "norm", 0), *((*variant, trial) for variant in settings.variants for trial in trials)]


def try_search(exp: Experiment, question: str, answer: str, trial: int) -> pd.DataFrame:
    """`accuracies_after_steps` at each target by the ranking that an answer gives: a row for each target and seed."""
    settings, seconds = exp.settings.ablations, 0.0
    if not question:
        ranking = legr.Ranking.norm_only(len(exp.norms))
    else:
        variant = settings.variants[question, answer]
        wanted = work.ranking_made_of(exp, variant, trial, False)
        record = measure(exp, wanted, lambda: _try(exp, variant, trial, f"{question}: {answer}, trial {trial}"))
        ranking, seconds = legr.Ranking(**record["ranking"]), record["seconds"]
    rows = []
    for target in exp.settings.targets:
        for seed, accuracy in zip(settings.seeds, accuracies_after_steps(exp, ranking, target), strict=True):
            rows.append((question, answer, trial, target, seed, accuracy))
    columns = ["question", "answer", "trial", "target", "seed", "accuracy"]
    return pd.DataFrame(rows, columns=columns).assign(search_seconds=seconds)


def _try(exp: Experiment, settings: RankingSettings, trial: int, what: str) -> dict[str, Any]:
    result = work.search(exp, settings, trial, (), what)
    return {"ranking": vars(result.ranking), "seconds": round(float(result.history.seconds.sum()), 1)}


def rankings_to_measure(exp: Experiment) -> list[tuple[str, legr.Ranking]]:
    """Norm-only, then as many random rankings as candidates of each of the searches for them."""
    settings = exp.settings.ablations
    rankings = [("norm", legr.Ranking.norm_only(len(exp.norms)))]
    candidates = jobs.run(exp, candidates_of, [(name,) for name in settings.candidates], "searches for candidates")
    for name, rankings_of_search in zip(settings.candidates, candidates, strict=True):
        rankings += [(name, ranking) for ranking in rankings_of_search]
    random = legr.search.Evolution(exp.norms, legr.search.SearchSettings(population=1000, evaluations=1000, seed=99))
    return rankings + [("random", random.ask()) for _ in range(settings.rankings - len(rankings))]


def in_words(exp: Experiment, record: dict[str, Any]) -> str:
    """What `ablate` took, and how the searches were made whose candidates are among `rankings_to_measure`: Markdown."""
    took = f"{record['seconds'] / 3600:.2f} hours of computing. Some of the rankings are candidates of searches:"
    searches = exp.settings.ablations.candidates.items()
    lines = [f"- *{name}*: {search_in_words(settings, len(exp.data.holdout))}." for name, settings in searches]
    return "\n".join([took, "", *lines])


def candidates_made_of(exp: Experiment, name: str) -> dict[str, Any]:
    settings = exp.settings.ablations
    count = (settings.rankings - 1) // (len(settings.candidates) + 1)
    search = work.ranking_made_of(exp, settings.candidates[name], 0, False)
    return search | {"candidates": count}


def candidates_of(exp: Experiment, name: str) -> list[legr.Ranking]:
    """Some candidates of a search, evenly from the best to the worst."""
    wanted = candidates_made_of(exp, name)

    def searched() -> dict[str, Any]:
        result = work.search(exp, exp.settings.ablations.candidates[name], 0, (), name)
        order = result.history.loss.argsort(kind="stable").to_numpy()
        evenly = np.linspace(0, len(order) - 1, wanted["candidates"]).round().astype(int)
        seconds = round(float(result.history.seconds.sum()), 1)
        return {"rankings": [vars(result.candidates[i]) for i in order[evenly]], "seconds": seconds}

    return [legr.Ranking(**each) for each in measure(exp, wanted, searched)["rankings"]]
