"""The work of the stages, as jobs: the dense network, a ranking, a pruned network, a ranking's fitness measured.

Every result has a key (see records.py), so that a stage which runs again makes only what is missing. For each kind one
function says what it is made of, and one makes it.
"""

import functools
import itertools
import statistics
from collections.abc import Collection
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
from experiments.methods import METHODS
from experiments.records import PACKED, made_of, masks_digest, measure, measurements, once, pack, said
from legr import models, training
from legr.files import atomic, digest, write_text
from legr.fitness import Fitness, FitnessSettings, Masks

AUGMENTATION = {"data": {"augmentation"}}  # what is trained depends on it


def dense_made_of(exp: Experiment, images: str, weights: str | None) -> dict[str, Any]:
    """`images` and `weights` are digests; None: from random weights."""
    inputs = {"images": images} | ({"weights": weights} if weights else {})
    settings = said(exp.settings, {"model": True, "dense": {"rescale", "recipes"}} | AUGMENTATION)
    return made_of(exp, "dense", settings, inputs, exp.settings.dense.seed)


def train_dense(exp: Experiment) -> dict[str, Any]:
    """Train the dense network, or adapt weights from elsewhere, on images that are not held out."""
    weights = pretrained.weights_digest(exp) if exp.settings.dense.weights else None
    return once(exp, "dense", dense_made_of(exp, exp.data.digest(), weights), lambda: _train_dense(exp))


def _train_dense(exp: Experiment) -> dict[str, Any]:
    settings = exp.settings.dense
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
    return values | {"files": ["network.safetensors", "training.csv"]}


def ranking_made_of(exp: Experiment, settings: RankingSettings, trial: int, keep: bool) -> dict[str, Any]:
    """A search's seed is the trial's number. `keep`: see `Method`."""
    search = settings.search.model_copy(update={"seed": 0})
    ranking = said(settings.model_copy(update={"search": search, "trials": None}))
    others = said(exp.settings, {"floor": True} | AUGMENTATION) | ({"keep": True} if keep else {})
    return made_of(exp, "ranking", {"ranking": ranking} | others, exp.inputs, trial)


def learn(exp: Experiment, method: str, trial: int) -> dict[str, Any]:
    """Learn a method's ranking in one trial."""
    wanted = ranking_made_of(exp, exp.settings.rankings[method], trial, METHODS[method].keep)
    return once(exp, f"record-{trial}", wanted, lambda: _learn(exp, method, trial))


def _learn(exp: Experiment, method: str, trial: int) -> dict[str, Any]:
    settings = exp.settings.rankings[method]
    result = _search(exp, settings, trial, METHODS[method].kept_layers(exp.graph), f"{method}, trial {trial}")
    result.ranking.save(exp.state / f"ranking-{trial}.json")
    write_text(exp.state / f"search-{trial}.csv", result.history.drop(columns="seconds").to_csv(index=False))
    maps = {name: np.array([getattr(c, name) for c in result.candidates]) for name in ("scale", "shift")}
    with atomic(exp.state / f"candidates-{trial}.safetensors") as path:
        save_file(maps, path)
    norm_only = result.history.loss[settings.search.population - 1]
    values = {"loss_of_norm_only": norm_only, "loss": float(result.history.loss.min())}
    values |= {"evaluations": len(result.history), "seconds": round(float(result.history.seconds.sum()), 1)}
    files = [f"ranking-{trial}.json", f"search-{trial}.csv", f"candidates-{trial}.safetensors"]
    return values | {"files": files}


def _search(
    exp: Experiment, settings: RankingSettings, trial: int, keep: Collection[str], what: str
) -> legr.search.SearchResult:
    search = settings.search.model_copy(update={"seed": trial})
    return legr.learn_ranking(
        exp.model,
        exp.graph,
        exp.data,
        settings.targets,
        search=search,
        fitness=settings.fitness,
        compute=exp.compute,
        floor=exp.settings.floor,
        keep=keep,
        start=legr.Ranking.norm_only(len(exp.norms)) if settings.start == "norm" else None,
        finalists=settings.finalists,
        state_folder=exp.state,
        log=progress(what, search.evaluations, "loss", "best"),
    )


def network_made_of(exp: Experiment, kept: Masks, trial: int) -> dict[str, Any]:
    """A fine-tuning's seed is the trial's number. How the masks were found makes no difference."""
    inputs = exp.inputs | {"masks": masks_digest(kept)}
    return made_of(exp, "network", said(exp.settings, {"finetune": True} | AUGMENTATION), inputs, trial)


def train_network(exp: Experiment, method: str, target: float, trial: int) -> dict[str, Any]:
    """Prune to `target` and fine-tune on `fit`, as the dense network was trained."""
    kept = exp.select(method, target, trial)
    make = functools.partial(_train_network, exp, method, target, trial, kept)
    return once(exp, f"{target}-{trial}", network_made_of(exp, kept, trial), make)


def _train_network(exp: Experiment, method: str, target: float, trial: int, kept: Masks) -> dict[str, Any]:
    settings, name = exp.settings.finetune, f"{target}-{trial}"
    compute = exp.compute
    fit, holdout, test = (images.to(compute.device) for images in (exp.data.fit, exp.data.holdout, exp.data.test))
    small = legr.prune(exp.model, exp.graph, kept).to(compute.device, memory_format=torch.channels_last)
    values = {"target": target, "trial": trial, "flops": exp.graph.flops(kept)}
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
    return values | {"files": files}


def cut_shares(exp: Experiment) -> list[float]:
    """Many fractions of the FLOPs, from all to the lowest target."""
    return np.linspace(1, min(exp.settings.targets), exp.settings.cuts.number).round(4).tolist()


def cut_everywhere(exp: Experiment, jobs: Jobs, method: str) -> None:
    """Make cuts.csv: a method's networks at many FLOP counts in the first trial, untrained."""
    rows = jobs.run(cut, [(method, share) for share in cut_shares(exp)], f"{method}: cuts")
    write_text(exp.out / "cuts.csv", pd.DataFrame(rows).to_csv(index=False))
    pack(exp, exp.out)


def cut_made_of(exp: Experiment, kept: Masks) -> dict[str, Any]:
    settings = said(exp.settings, {"cuts": {"test_images"}, "finetune": {"recalibration_images"}})
    return made_of(exp, "cuts", settings, exp.inputs | {"masks": masks_digest(kept)})


def cut(exp: Experiment, method: str, share: float) -> dict[str, Any]:
    """A method's network at the fraction `share` of the FLOPs: its size; its accuracy with BatchNorm recalibrated."""
    kept = exp.select(method, share)

    def measured() -> dict[str, float]:
        test = exp.data.test
        picked = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[: exp.settings.cuts.test_images]
        return {"accuracy_recalibrated": recalibrated_accuracy(exp, kept, test[picked].to(exp.compute.device))}

    values = {"share": share, "flops": exp.graph.flops(kept), "params": exp.graph.params(kept)}
    values["accuracy_recalibrated"] = measure(exp, cut_made_of(exp, kept), measured)["accuracy_recalibrated"]
    return values | {"widths": " ".join(str(int(mask.sum())) for mask in kept)}


def recalibrated_accuracy(exp: Experiment, kept: list[Tensor], test) -> float:
    """Accuracy of a pruned network with BatchNorm's statistics re-estimated, weights untouched."""
    fit = exp.data.fit
    picked = torch.randperm(len(fit), generator=torch.Generator().manual_seed(0))
    few = fit[picked[: exp.settings.finetune.recalibration_images]].load().to(exp.compute.device)
    small = legr.prune(exp.model, exp.graph, kept).to(exp.compute.device, memory_format=torch.channels_last)
    training.recalibrate(small, few, exp.compute)
    return training.evaluate(small, test, exp.compute)["accuracy"]


@functools.lru_cache(maxsize=64)
def _fitness(exp: Experiment, settings: FitnessSettings, target: float, seed: int) -> Fitness:
    return Fitness(exp.model, exp.graph, exp.data, [target], settings, exp.compute, exp.settings.floor, seed)


@functools.lru_cache(maxsize=64)
def _fitness_on_test_images(exp: Experiment, settings: FitnessSettings, target: float, seed: int) -> Fitness:
    fitness = Fitness(exp.model, exp.graph, exp.data, [target], settings, exp.compute, exp.settings.floor, seed)
    fitness.validation = exp.data.test.to(exp.compute.device)
    return fitness


def fitness_made_of(exp: Experiment, what: str, settings: FitnessSettings, kept: Masks, seed: int) -> dict[str, Any]:
    """`what` is measured: a loss on held-out images, or an accuracy on test images."""
    inputs = exp.inputs | {"masks": masks_digest(kept)}
    settings = {"what": what, "fitness": said(settings)} | said(exp.settings, AUGMENTATION)
    return made_of(exp, "measurement", settings, inputs, seed)


def fitness_of(exp: Experiment, ranking: legr.Ranking, target: float, settings: FitnessSettings) -> float:
    """A ranking's loss on held-out images by a fitness."""
    fitness = _fitness(exp, settings, target, 0)
    (kept,) = fitness.select(ranking)
    wanted = fitness_made_of(exp, "loss on held-out images", settings, kept, 0)
    return measure(exp, wanted, lambda: {"loss": fitness([kept])["loss"]})["loss"]


def accuracies_after_steps(exp: Experiment, ranking: legr.Ranking, target: float) -> list[float]:
    """What a fitness should predict: test accuracy after some steps of fine-tuning, with each seed."""
    settings, accuracies = exp.settings.ablations, []
    steps = FitnessSettings(
        steps=settings.steps,
        lr=settings.lr,
        batch_size=settings.batch_size,
        recalibration_images=settings.recalibration_images,
    )
    for seed in settings.seeds:
        fitness = _fitness_on_test_images(exp, steps, target, seed)
        (kept,) = fitness.select(ranking)
        wanted = fitness_made_of(exp, "accuracy on test images", steps, kept, seed)
        record = measure(exp, wanted, lambda fitness=fitness, kept=kept: {"accuracy": fitness([kept])["accuracy"]})
        accuracies.append(record["accuracy"])
    return accuracies


def ablations_made_of(exp: Experiment) -> dict[str, Any]:
    candidates = [searched(exp, method)[1] for method in exp.settings.rankings]
    inputs = exp.inputs | {"candidates": digest([list(map(vars, each)) for each in candidates])}
    settings = said(exp.settings, {"ablations": True, "floor": True, "targets": True} | AUGMENTATION)
    return made_of(exp, "measurement", settings, inputs)


def ablate(exp: Experiment, jobs: Jobs) -> dict[str, Any]:
    """Make fitness.csv (rankings judged by each fitness) and searches.csv (what searches with other settings find)."""
    return once(exp, "ablations", ablations_made_of(exp), lambda: _ablate(exp, jobs))


def _ablate(exp: Experiment, jobs: Jobs) -> dict[str, Any]:
    settings = exp.settings.ablations
    rankings = [(source, ranking, t) for t in settings.targets for source, ranking in rankings_to_measure(exp)]
    table = pd.DataFrame(jobs.run(compare_fitness, [each[1:] for each in rankings], "rankings"))
    table = table.assign(source=[source for source, _, _ in rankings], target=[t for _, _, t in rankings])
    searches = pd.concat(jobs.run(try_search, searches_to_try(exp), "searches"))
    for name, rows in {"fitness": table, "searches": searches}.items():
        write_text(exp.state / f"{name}.csv", rows.to_csv(index=False))
    seconds = sum(record["seconds"] or 0 for record in measurements(exp.out))
    pack(exp, exp.state)
    return {"files": ["fitness.csv", "searches.csv", PACKED], "seconds": seconds}


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
    each = [(*variant, trial) for variant in settings.variants for trial in range(settings.search.trials or 1)]
    for method in exp.settings.rankings:
        stopped = itertools.product(settings.evaluations, exp.trials(method))
        each += [(f"{method}: evaluations", str(count), trial) for count, trial in stopped]
    return [("", "norm", 0), *each]


def try_search(exp: Experiment, question: str, answer: str, trial: int) -> pd.DataFrame:
    """`accuracies_after_steps` at each target by the ranking that an answer gives: a row for each target and seed."""
    settings, seconds = exp.settings.ablations, 0.0
    if not question:
        ranking = legr.Ranking.norm_only(len(exp.norms))
    elif variant := settings.variants.get((question, answer)):
        wanted = ranking_made_of(exp, variant, trial, False)
        record = measure(exp, wanted, lambda: _try(exp, variant, trial, f"{question}: {answer}, trial {trial}"))
        ranking, seconds = legr.Ranking(**record["ranking"]), record["seconds"]
    else:
        history, candidates = searched(exp, question.partition(":")[0], trial)
        ranking, seconds = candidates[history.loss[: int(answer)].argmin()], float("nan")
    rows = []
    for target in exp.settings.targets:
        for seed, accuracy in zip(settings.seeds, accuracies_after_steps(exp, ranking, target), strict=True):
            rows.append((question, answer, trial, target, seed, accuracy))
    columns = ["question", "answer", "trial", "target", "seed", "accuracy"]
    return pd.DataFrame(rows, columns=columns).assign(search_seconds=seconds)


def _try(exp: Experiment, settings: RankingSettings, trial: int, what: str) -> dict[str, Any]:
    result = _search(exp, settings, trial, (), what)
    return {"ranking": vars(result.ranking), "seconds": round(float(result.history.seconds.sum()), 1)}


def searched(exp: Experiment, method: str, trial: int = 0) -> tuple[pd.DataFrame, list[legr.Ranking]]:
    """The history and the candidates of a method's search."""
    maps = load_file(exp.path(f"rankings/{method}/candidates-{trial}.safetensors"))
    pairs = zip(maps["scale"].tolist(), maps["shift"].tolist(), strict=True)
    history = pd.read_csv(exp.path(f"rankings/{method}/search-{trial}.csv"))
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
