"""The work of the stages, as jobs: the dense network, a ranking, a pruned network, a ranking's fitness measured.

Every result carries the key of everything that made it, so that a stage which runs again makes only what is missing.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

import legr
from experiments import pretrained
from experiments.config import Experiment, RankingSettings
from experiments.jobs import Jobs, progress
from legr import models, training
from legr.files import atomic, read_json, tensors_digest, write_json, write_text
from legr.fitness import Fitness, FitnessSettings, Masks


def train_dense(exp: Experiment) -> dict[str, Any]:
    """Train the dense network, or adapt weights from elsewhere, on images that are not held out."""
    settings = exp.settings.dense
    key = exp.key("dense", exp.data.digest(), exp.settings.model, settings.model_dump())
    if record := exp.kept("dense", key):
        return record
    data = exp.data.to(exp.compute.device)
    fit, holdout = data.fit, data.holdout
    model = models.build(exp.settings.model, len(data.classes), settings.seed).to(exp.compute.device)
    origin, history = {"weights": "random"}, pd.DataFrame()
    if settings.weights:
        origin = pretrained.start(model, exp)
        found = training.evaluate(model, holdout, exp.compute)
        history = pd.DataFrame([{"epoch": 0, "val_loss": found["loss"], "val_accuracy": found["accuracy"]}])
    for number, recipe in enumerate(settings.recipes):
        log = progress(f"dense, recipe {number + 1}", recipe.epochs, "train_loss", "val_accuracy")
        rows = training.train(
            model, fit, recipe, exp.compute, seed=settings.seed + number, state_folder=exp.state, validation=holdout,
            log=log,
        )  # fmt: skip
        before = 0 if history.empty else history.epoch.max()
        history = pd.concat([history, rows.assign(epoch=rows.epoch + before)], ignore_index=True)
    model.load_state_dict(models.halved(model.state_dict()))  # as in its file
    models.save_weights(model, exp.state / "network.safetensors")
    write_text(exp.state / "training.csv", history.to_csv(index=False))
    test = training.evaluate(model, data.test, exp.compute)
    graph = legr.trace(model, exp.example)
    values = {**test, "flops": graph.flops(), "params": graph.params()}
    values |= {"epochs": int(history.epoch.max()) if len(history) else 0, "train_images": len(fit)}
    values |= {"test_images": len(data.test), "seconds": float(history.get("seconds", pd.Series()).sum()), **origin}
    return exp.record("dense", key, ["network.safetensors", "training.csv"], values)


def learn(exp: Experiment, method: str, trial: int) -> dict[str, Any]:
    """Learn a method's ranking in one trial; its search's seed is the trial's number."""
    settings = exp.settings.rankings[method]
    search = settings.search.model_copy(update={"seed": trial})
    key = exp.key("ranking", *exp.inputs, settings.model_dump(), search.model_dump(), exp.settings.floor)
    if record := exp.kept(f"record-{trial}", key):
        return record
    result = _search(exp, settings, trial, f"{method}, trial {trial}")
    result.ranking.save(exp.state / f"ranking-{trial}.json")
    write_text(exp.state / f"search-{trial}.csv", result.history.drop(columns="seconds").to_csv(index=False))
    maps = {name: np.array([getattr(c, name) for c in result.candidates]) for name in ("scale", "shift")}
    with atomic(exp.state / f"candidates-{trial}.safetensors") as path:
        save_file(maps, path)
    norm_only = result.history.loss[search.population - 1]
    values = {"loss_of_norm_only": norm_only, "loss": float(result.history.loss.min())}
    values |= {"evaluations": search.evaluations, "seconds": round(float(result.history.seconds.sum()), 1)}
    files = [f"ranking-{trial}.json", f"search-{trial}.csv", f"candidates-{trial}.safetensors"]
    return exp.record(f"record-{trial}", key, files, values)


def _search(exp: Experiment, settings: RankingSettings, trial: int, what: str) -> legr.search.SearchResult:
    search = settings.search.model_copy(update={"seed": trial})
    return legr.learn_ranking(
        exp.model,
        exp.graph,
        exp.data,
        settings.flops,
        search=search,
        fitness=settings.fitness,
        compute=exp.compute,
        floor=exp.settings.floor,
        start=legr.Ranking.norm_only(len(exp.norms)) if settings.start == "norm" else None,
        state_folder=exp.state,
        log=progress(what, search.evaluations, "loss", "best"),
    )


def train_network(exp: Experiment, method: str, target: float, trial: int) -> dict[str, Any]:
    """Prune to `target` and fine-tune on `fit`, as the dense network was trained; the seed is the trial's number."""
    kept, settings = exp.select(method, target, trial), exp.settings.finetune
    key, name = exp.key("network", *exp.inputs, _named(kept), settings.model_dump(), trial), f"{target}-{trial}"
    if record := exp.kept(name, key):
        return record
    compute = exp.compute
    fit, holdout, test = (images.to(compute.device) for images in (exp.data.fit, exp.data.holdout, exp.data.test))
    small = legr.prune(exp.model, exp.graph, kept).to(compute.device, memory_format=torch.channels_last)
    values = {"method": method, "target": target, "trial": trial, "flops": exp.graph.flops(kept)}
    values |= {"flops_ratio": values["flops"] / exp.graph.flops(), "params": exp.graph.params(kept)}
    values["accuracy_before"] = training.evaluate(small, test, compute)["accuracy"]
    values["accuracy_recalibrated"] = recalibrated_accuracy(exp, kept, test)
    pruned = {"epoch": 0, "val_accuracy": training.evaluate(small, holdout, compute)["accuracy"]}
    log = progress(f"{method} {target:.0%}, trial {trial}", settings.recipe.epochs, "train_loss", "train_accuracy")
    rows = training.train(
        small, fit, settings.recipe, compute, seed=trial, state_folder=exp.state, validation=holdout, log=log
    )
    curve = pd.concat([pd.DataFrame([pruned]), rows[["epoch", "val_accuracy"]]])
    write_text(exp.state / f"{name}.csv", curve.to_csv(index=False))
    values["accuracy_float32"] = training.evaluate(small, test, compute)["accuracy"]
    small.load_state_dict(models.halved(small.state_dict()))  # as in its file
    result, files = training.evaluate(small, test, compute), [f"{name}.csv"]
    values |= {"accuracy": result["accuracy"], "test_loss": result["loss"], "epochs": settings.recipe.epochs}
    values |= {"seconds": round(rows.seconds.sum(), 1), "widths": [int(mask.sum()) for mask in kept]}
    if trial == 0:  # the networks of one trial are published
        files.append(f"{name}.safetensors")
        models.save_weights(small, exp.state / files[-1])
    return exp.record(name, key, files, values)


def cut_everywhere(exp: Experiment, jobs: Jobs, method: str) -> dict[str, Any]:
    """Make cuts.csv: a method's networks at many FLOP counts in the first trial, untrained."""
    shares = np.linspace(1, min(exp.settings.targets), exp.settings.cuts.number).round(4).tolist()
    masks = [_named(exp.select(method, share)) for share in shares]
    few = exp.settings.finetune.recalibration_images
    key = exp.key("cuts", *exp.inputs, shares, masks, exp.settings.cuts.model_dump(), few)
    if record := exp.kept("cuts", key):
        return record
    rows = jobs.run(cut, [(method, share) for share in shares], f"{method}: cuts")
    write_text(exp.state / "cuts.csv", pd.DataFrame(rows).to_csv(index=False))
    return exp.record("cuts", key, ["cuts.csv"], {"seconds": _seconds(exp, "cut")})


def cut(exp: Experiment, method: str, share: float) -> dict[str, Any]:
    """A method's network at the fraction `share` of the FLOPs: its size; its accuracy with BatchNorm recalibrated."""
    kept, number = exp.select(method, share), exp.settings.cuts.test_images
    few = exp.settings.finetune.recalibration_images

    def measured() -> float:
        test = exp.data.test
        picked = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:number]
        return recalibrated_accuracy(exp, kept, test[picked].to(exp.compute.device))

    values = {"share": share, "flops": exp.graph.flops(kept), "params": exp.graph.params(kept)}
    values["accuracy_recalibrated"] = _once(exp, "cut", measured, _named(kept), number, few)
    return values | {"widths": " ".join(str(int(mask.sum())) for mask in kept)}


def _named(kept: Masks) -> str:
    """A digest of masks."""
    return tensors_digest({str(i): mask for i, mask in enumerate(kept)})


def recalibrated_accuracy(exp: Experiment, kept: list[Tensor], test) -> float:
    """Accuracy of a pruned network with BatchNorm's statistics re-estimated, weights untouched."""
    fit = exp.data.fit
    picked = torch.randperm(len(fit), generator=torch.Generator().manual_seed(0))
    few = fit[picked[: exp.settings.finetune.recalibration_images]].load().to(exp.compute.device)
    small = legr.prune(exp.model, exp.graph, kept).to(exp.compute.device, memory_format=torch.channels_last)
    training.recalibrate(small, few, exp.compute)
    return training.evaluate(small, test, exp.compute)["accuracy"]


@functools.lru_cache(maxsize=64)
def _measure(exp: Experiment, settings: FitnessSettings, target: float, seed: int, test: bool) -> Fitness:
    measure = Fitness(exp.model, exp.graph, exp.data, [target], settings, exp.compute, exp.settings.floor, seed)
    if test:
        measure.validation = exp.data.test.to(exp.compute.device)
    return measure


def measure_ranking(
    exp: Experiment, ranking: legr.Ranking, target: float, settings: FitnessSettings, seed: int, test: bool
) -> float:
    """A ranking's loss on held-out images by a fitness; with `test`, its accuracy on test images instead."""

    def measured() -> float:
        measure = _measure(exp, settings, target, seed, test)
        return measure(measure.select(ranking))["accuracy" if test else "loss"]

    return _once(exp, "measured", measured, vars(ranking), target, settings.model_dump(), seed, test)


def _once(exp: Experiment, name: str, make: Callable[[], Any], *given: Any) -> Any:
    """What `make` returns from the inputs `given`; noted in the state folder, with the seconds that it took."""
    path = exp.state / f"{name}-{exp.key(name, *exp.inputs, *given)}.json"
    if not path.exists():
        start = time.perf_counter()
        write_json(path, {"value": make(), "seconds": time.perf_counter() - start})
    return read_json(path, "measurement")["value"]


def _seconds(exp: Experiment, name: str) -> float:
    """Computing time of all that `_once` noted under a name."""
    return round(sum(read_json(path, "measurement")["seconds"] for path in exp.state.glob(f"{name}-*.json")), 1)


def accuracies_after_steps(exp: Experiment, ranking: legr.Ranking, target: float) -> list[float]:
    """What a fitness should predict: test accuracy after some steps of fine-tuning, with each seed."""
    settings = exp.settings.ablations
    steps = FitnessSettings(steps=settings.steps, lr=settings.lr, batch_size=settings.batch_size)
    return [measure_ranking(exp, ranking, target, steps, seed, True) for seed in settings.seeds]


def ablate(exp: Experiment, jobs: Jobs) -> dict[str, Any]:
    """Make fitness.csv (rankings judged by each fitness) and searches.csv (what searches with other settings find)."""
    settings = exp.settings.ablations
    learned = [read_json(exp.path(f"rankings/{m}/record-0.json"), "record of a search") for m in exp.settings.rankings]
    key = exp.key("ablations", *exp.inputs, settings.model_dump(), exp.settings.targets, exp.settings.floor,
                  [record["key"] for record in learned])  # fmt: skip
    if record := exp.kept("ablations", key):
        return record
    rankings = [(source, ranking, t) for t in settings.targets for source, ranking in rankings_to_measure(exp)]
    table = pd.DataFrame(jobs.run(compare_fitness, [each[1:] for each in rankings], "rankings"))
    table = table.assign(source=[source for source, _, _ in rankings], target=[t for _, _, t in rankings])
    searches = pd.concat(jobs.run(try_search, searches_to_try(exp), "searches"))
    for name, rows in {"fitness": table, "searches": searches}.items():
        write_text(exp.state / f"{name}.csv", rows.to_csv(index=False))
    seconds = _seconds(exp, "measured") + searches.groupby(["question", "answer"]).search_seconds.first().sum()
    return exp.record("ablations", key, ["fitness.csv", "searches.csv"], {"seconds": seconds})


def compare_fitness(exp: Experiment, ranking: legr.Ranking, target: float) -> dict[str, float]:
    """A ranking's loss by each fitness of the ablation, and the mean and deviation of `accuracies_after_steps`."""
    fitness = exp.settings.ablations.fitness
    row = {name: measure_ranking(exp, ranking, target, settings, 0, False) for name, settings in fitness.items()}
    accuracies = accuracies_after_steps(exp, ranking, target)
    row["accuracy"] = statistics.mean(accuracies)
    row["deviation"] = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
    return row


def searches_to_try(exp: Experiment) -> list[tuple[str, str]]:
    """The questions of the ablation, each with its answers; norm-only belongs to all of them."""
    settings = exp.settings.ablations
    stopped = [(f"{method}: evaluations", str(n)) for method in exp.settings.rankings for n in settings.evaluations]
    return [("", "norm"), *settings.variants, *stopped]


def try_search(exp: Experiment, question: str, answer: str) -> pd.DataFrame:
    """`accuracies_after_steps` at each target by the ranking that an answer gives: a row for each target and seed."""
    settings, seconds = exp.settings.ablations, 0.0
    if not question:
        ranking = legr.Ranking.norm_only(len(exp.norms))
    elif variant := settings.variants.get((question, answer)):
        found = _search(exp, variant, 0, f"{question}: {answer}")
        ranking, seconds = found.ranking, float(found.history.seconds.sum())
    else:
        history, candidates = searched(exp, question.partition(":")[0])
        ranking, seconds = candidates[history.loss[: int(answer)].argmin()], float("nan")
    rows = []
    for target in exp.settings.targets:
        for seed, accuracy in zip(settings.seeds, accuracies_after_steps(exp, ranking, target), strict=True):
            rows.append({"question": question, "answer": answer, "target": target, "seed": seed, "accuracy": accuracy})
    return pd.DataFrame(rows).assign(search_seconds=seconds)


def searched(exp: Experiment, method: str) -> tuple[pd.DataFrame, list[legr.Ranking]]:
    """The history and the candidates of a method's search in the first trial."""
    maps = load_file(exp.path(f"rankings/{method}/candidates-0.safetensors"))
    pairs = zip(maps["scale"].tolist(), maps["shift"].tolist(), strict=True)
    history = pd.read_csv(exp.path(f"rankings/{method}/search-0.csv"))
    return history, [legr.Ranking(tuple(scale), tuple(shift)) for scale, shift in pairs]


def rankings_to_measure(exp: Experiment) -> list[tuple[str, legr.Ranking]]:
    """Norm-only, then as many random rankings as candidates of each method's search, from best to worst."""
    count, methods = exp.settings.ablations.rankings - 1, list(exp.settings.rankings)
    share = count // (len(methods) + 1)
    found = [("norm", legr.Ranking.norm_only(len(exp.norms)))]
    for method in methods:
        history, candidates = searched(exp, method)
        order = history.loss.argsort(kind="stable").to_numpy()
        found += [(method, candidates[i]) for i in order[np.linspace(0, len(order) - 1, share).round().astype(int)]]
    random = legr.search.Evolution(exp.norms, legr.search.SearchSettings(population=1000, evaluations=1000, seed=99))
    found += [("random", random.ask()) for _ in range(count + 1 - len(found))]
    return found
