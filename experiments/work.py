"""The work of the stages, as jobs: the dense network, a ranking, a pruned network, a ranking's fitness measured.

Every result carries the key of everything that made it, so that a stage which runs again makes only what is missing.
"""

import functools
import statistics
import time
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

import legr
from experiments import pretrained
from experiments.config import Experiment
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


def learn(exp: Experiment, jobs: Jobs, method: str, trial: int) -> dict[str, Any]:
    """Learn a method's ranking in one trial; its search's seed is the trial's number."""
    settings = exp.settings.rankings[method]
    search = settings.search.model_copy(update={"seed": trial})
    key = exp.key("ranking", *exp.inputs, settings.model_dump(), search.model_dump(), exp.settings.floor)
    if record := exp.kept(f"record-{trial}", key):
        return record
    start = legr.Ranking.norm_only(len(exp.norms)) if settings.start == "norm" else None
    result = legr.learn_ranking(
        exp.model,
        exp.graph,
        exp.data,
        settings.flops,
        search=search,
        fitness=settings.fitness,
        compute=exp.compute,
        floor=exp.settings.floor,
        start=start,
        state_folder=exp.state,
        submit=functools.partial(jobs.submit, evaluate_candidate, method, trial) if jobs.client else None,
        log=progress(f"{method}, trial {trial}", search.evaluations, "loss", "best"),
    )
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


@functools.lru_cache(maxsize=2)
def _judge(exp: Experiment, method: str, trial: int) -> Fitness:
    settings = exp.settings.rankings[method]
    model, graph, floor = exp.model, exp.graph, exp.settings.floor
    return Fitness(model, graph, exp.data, settings.flops, settings.fitness, exp.compute, floor, trial)


def evaluate_candidate(exp: Experiment, method: str, trial: int, networks: list[Masks]) -> dict[str, float]:
    """The fitness of a candidate of a search, from what it keeps."""
    return _judge(exp, method, trial)(networks)


def train_network(exp: Experiment, method: str, target: float, trial: int) -> dict[str, Any]:
    """Prune to `target` and fine-tune on all training images; the seed is the trial's number."""
    kept, settings = exp.select(method, target, trial), exp.settings.finetune
    masks = tensors_digest({str(i): mask for i, mask in enumerate(kept)})
    key, name = exp.key("network", *exp.inputs, masks, settings.model_dump(), trial), f"{target}-{trial}"
    if record := exp.kept(name, key):
        return record
    start, compute = time.perf_counter(), exp.compute
    train, test = exp.data.train.to(compute.device), exp.data.test.to(compute.device)
    small = legr.prune(exp.model, exp.graph, kept).to(compute.device, memory_format=torch.channels_last)
    values = {"method": method, "target": target, "trial": trial, "flops": exp.graph.flops(kept)}
    values |= {"flops_ratio": values["flops"] / exp.graph.flops(), "params": exp.graph.params(kept)}
    values["accuracy_before"] = training.evaluate(small, test, compute)["accuracy"]
    values["accuracy_recalibrated"] = recalibrated_accuracy(exp, kept, test)
    log = progress(f"{method} {target:.0%}, trial {trial}", settings.recipe.epochs, "train_loss", "train_accuracy")
    training.train(small, train, settings.recipe, compute, seed=trial, state_folder=exp.state, log=log)
    small.load_state_dict(models.halved(small.state_dict()))  # as in its file
    result, files = training.evaluate(small, test, compute), []
    values |= {"accuracy": result["accuracy"], "test_loss": result["loss"], "epochs": settings.recipe.epochs}
    values |= {"seconds": round(time.perf_counter() - start, 1), "widths": [int(mask.sum()) for mask in kept]}
    if trial == 0:  # the networks of one trial are published
        files = [f"{name}.safetensors"]
        models.save_weights(small, exp.state / files[0])
    return exp.record(name, key, files, values)


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


def measure_ranking(exp: Experiment, scale: list[float], shift: list[float], target: float) -> dict[str, float]:
    """A ranking's loss by each fitness of the ablation, and what it should predict: test accuracy after some steps."""
    settings, ranking = exp.settings.ablations, legr.Ranking(tuple(scale), tuple(shift))
    path = exp.state / f"measured-{exp.key('measured', *exp.inputs, scale, shift, target, settings.model_dump())}.json"
    if path.exists():
        return read_json(path, "fitness of a ranking")
    row = {}
    for name, fitness in settings.fitness.items():
        measure = _measure(exp, fitness, target, 0, False)
        row[name] = measure(measure.select(ranking))["loss"]
    steps = FitnessSettings(steps=settings.steps, lr=settings.lr, batch_size=settings.batch_size)
    accuracies = []
    for seed in settings.seeds:
        measure = _measure(exp, steps, target, seed, True)
        accuracies.append(measure(measure.select(ranking))["accuracy"])
    row["accuracy"] = statistics.mean(accuracies)
    row["deviation"] = statistics.stdev(accuracies) if len(accuracies) > 1 else float("nan")
    write_json(path, row)
    return row


def rankings_to_measure(exp: Experiment) -> list[tuple[str, legr.Ranking]]:
    """Norm-only, then as many random rankings as candidates of each method's search, from best to worst."""
    count, methods = exp.settings.ablations.rankings - 1, list(exp.settings.rankings)
    share = count // (len(methods) + 1)
    found = [("norm", legr.Ranking.norm_only(len(exp.norms)))]
    for method in methods:
        history = pd.read_csv(exp.path(f"rankings/{method}/search-0.csv"))
        maps = load_file(exp.path(f"rankings/{method}/candidates-0.safetensors"))
        order = history.loss.argsort(kind="stable").to_numpy()
        for i in order[np.linspace(0, len(order) - 1, share).round().astype(int)]:
            found.append((method, legr.Ranking(tuple(maps["scale"][i].tolist()), tuple(maps["shift"][i].tolist()))))
    random = legr.search.Evolution(exp.norms, legr.search.SearchSettings(population=1000, evaluations=1000, seed=99))
    found += [("random", random.ask()) for _ in range(count + 1 - len(found))]
    return found


def network(exp: Experiment, method: str, target: float) -> nn.Module:
    """A method's published network: that of the first trial, in eval mode on the CPU."""
    small = legr.prune(exp.model, exp.graph, exp.select(method, target))
    return models.load_weights(small, exp.path(f"sets/{method}/{target}-0.safetensors")).eval()


def all_networks(exp: Experiment) -> pd.DataFrame:
    """The records of all pruned networks of the experiment: every method, target and trial."""
    names = [(m, t, k) for m in exp.methods for t in exp.settings.targets for k in range(exp.settings.trials)]
    what = "record of a pruned network (the set stage makes it)"
    rows = [read_json(exp.path(f"sets/{method}/{target}-{trial}.json"), what) for method, target, trial in names]
    return pd.DataFrame(rows).drop(columns=["key", "files", "widths"], errors="ignore")


def papers_networks(exp: Experiment) -> pd.DataFrame | None:
    """The paper's networks (accuracies in percent), where it pruned this model on these images."""
    table = pd.read_csv(exp.root / "experiments/paper.csv")
    found = table[(table.model == exp.settings.model) & (table.data == exp.settings.data.name)]
    return None if found.empty else found.drop(columns=["model", "data"])
