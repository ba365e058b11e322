"""The work of the stages, as jobs: the dense network, a ranking, a pruned network, cuts without training, latency.

Every result has a key (see records.py), so that a stage which runs again makes only what is missing. For each kind one
function says what it is made of, and one makes it.
"""

import functools
import sys
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.numpy import save_file
from torch import Tensor

import legr
from experiments.data import pretrained
from experiments.experiment import Experiment
from experiments.methods import METHODS
from experiments.pipeline import jobs
from experiments.pipeline.jobs import progress
from experiments.records import as_written, hardware, made_of, masks_digest, measure, once, pack
from experiments.settings import RankingSettings
from legr import latency, models, training
from legr.files import UserError, atomic, read_json, tensors_digest, write_text
from legr.fitness import Masks

AUGMENTATION = {"data": {"augmentation"}}  # what is trained depends on it


def dense_made_of(exp: Experiment, images: str, weights: str | None) -> dict[str, Any]:
    """`images` and `weights` are digests; None: from random weights."""
    inputs = {"images": images} | ({"weights": weights} if weights else {})
    settings = as_written(exp.settings, {"model": True, "dense": {"rescale", "recipes"}} | AUGMENTATION)
    return made_of(exp, "dense", settings, inputs, exp.settings.dense.seed)


def train_dense(exp: Experiment) -> dict[str, Any]:
    """Train the dense network, or adapt weights from elsewhere, on images that are not held out."""
    weights = _weights_digest(exp) if exp.settings.dense.weights else None
    return once(exp, "dense", dense_made_of(exp, exp.data.digest(), weights), lambda: _train_dense(exp))


def _weights_digest(exp: Experiment) -> str:
    """Names the weights by their content; where they can't be had, as the record of the dense network does."""
    try:
        return tensors_digest(pretrained.read(exp.settings, exp.data.classes, exp.root))
    except UserError as error:
        path = exp.path("dense/dense.json")
        made_of = read_json(path, "record of the dense network").get("made_of", {}) if path.exists() else {}
        if "weights" not in made_of.get("inputs", {}):
            raise
        print(f"{error}; they are taken to be those of {path.relative_to(exp.root)}", file=sys.stderr)
        return made_of["inputs"]["weights"]


def _train_dense(exp: Experiment) -> dict[str, Any]:
    settings = exp.settings.dense
    data = exp.data.to(exp.compute.device)
    fit, holdout = data.fit, data.holdout
    model = models.build(exp.settings.model, len(data.classes), settings.seed).to(exp.compute.device)
    origin, history = {"weights": "random"}, pd.DataFrame()
    if settings.weights:
        origin = pretrained.start(model, exp.settings, data.classes, exp.root)
        before = training.evaluate(model, holdout, exp.compute)
        history = pd.DataFrame([{"epoch": 0, "val_loss": before["loss"], "val_accuracy": before["accuracy"]}])
    for number, recipe in enumerate(settings.recipes):
        log = progress(f"dense, recipe {number + 1}", recipe.epochs, "train_loss", "val_accuracy")
        rows = training.train(
            model, fit, recipe, exp.compute, seed=settings.seed + number, state_folder=exp.state, validation=holdout,
            log=log,
        )  # fmt: skip
        epochs_before = 0 if history.empty else history.epoch.max()
        history = pd.concat([history, rows.assign(epoch=rows.epoch + epochs_before)], ignore_index=True)
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
    ranking = as_written(settings.model_copy(update={"search": search, "trials": None}))
    others = as_written(exp.settings, {"floor": True} | AUGMENTATION) | ({"keep": True} if keep else {})
    return made_of(exp, "ranking", {"ranking": ranking} | others, exp.inputs, trial)


def learn(exp: Experiment, method: str, trial: int) -> dict[str, Any]:
    """Learn a method's ranking in one trial."""
    wanted = ranking_made_of(exp, exp.settings.rankings[method], trial, METHODS[method].keep)
    return once(exp, f"record-{trial}", wanted, lambda: _learn(exp, method, trial))


def _learn(exp: Experiment, method: str, trial: int) -> dict[str, Any]:
    settings = exp.settings.rankings[method]
    result = search(exp, settings, trial, METHODS[method].kept_layers(exp.graph), f"{method}, trial {trial}")
    result.ranking.save(exp.state / f"ranking-{trial}.json")
    write_text(exp.state / f"search-{trial}.csv", result.history.drop(columns="seconds").to_csv(index=False))
    maps = {name: np.array([getattr(c, name) for c in result.candidates]) for name in ("scale", "shift")}
    with atomic(exp.state / f"candidates-{trial}.safetensors") as path:
        save_file(maps, path)
    files, seconds = [f"ranking-{trial}.json", f"search-{trial}.csv", f"candidates-{trial}.safetensors"], 0.0
    if result.finalists is not None:
        files.append(f"finalists-{trial}.csv")
        write_text(exp.state / files[-1], result.finalists.drop(columns="seconds").to_csv(index=False))
        seconds = result.finalists.seconds.sum()
    losses = result.history.loss
    values = {"loss_of_norm_only": losses[settings.search.population - 1]}
    values |= {"loss": float(losses[result.candidates.index(result.ranking)]), "evaluations": len(losses)}
    return values | {"seconds": round(float(result.history.seconds.sum() + seconds), 1), "files": files}


def search(
    exp: Experiment, settings: RankingSettings, trial: int, keep: Collection[str], what: str
) -> legr.search.SearchResult:
    """Search by `settings`, with the trial's number as seed; `what` names it beside its progress."""
    constants = settings.search.model_copy(update={"seed": trial})
    return legr.learn_ranking(
        exp.model,
        exp.graph,
        exp.data,
        settings.targets,
        search=constants,
        fitness=settings.fitness,
        compute=exp.compute,
        floor=exp.settings.floor,
        keep=keep,
        start=legr.Ranking.norm_only(len(exp.norms)) if settings.start == "norm" else None,
        finalists=settings.finalists,
        state_folder=exp.state,
        log=progress(what, constants.evaluations, "loss", "best"),
    )


def network_made_of(exp: Experiment, kept: Masks, trial: int) -> dict[str, Any]:
    """A fine-tuning's seed is the trial's number. How the masks were found makes no difference."""
    inputs = exp.inputs | {"masks": masks_digest(kept)}
    return made_of(exp, "network", as_written(exp.settings, {"finetune": True} | AUGMENTATION), inputs, trial)


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


def cut_everywhere(exp: Experiment, method: str) -> None:
    """Make cuts.csv: a method's networks in the first trial, untrained, from all FLOPs to the lowest target."""
    shares = np.linspace(1, min(exp.settings.targets), exp.settings.cuts.number).round(4).tolist()
    rows = jobs.run(exp, cut, [(method, share) for share in shares], f"{method}: cuts")
    write_text(exp.out / "cuts.csv", pd.DataFrame(rows).to_csv(index=False))
    pack(exp, exp.out)


def cut_made_of(exp: Experiment, kept: Masks) -> dict[str, Any]:
    settings = as_written(exp.settings, {"cuts": {"test_images"}, "finetune": {"recalibration_images"}})
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
    sample = fit[picked[: exp.settings.finetune.recalibration_images]].load().to(exp.compute.device)
    small = legr.prune(exp.model, exp.graph, kept).to(exp.compute.device, memory_format=torch.channels_last)
    training.recalibrate(small, sample, exp.compute)
    return training.evaluate(small, test, exp.compute)["accuracy"]


def latencies(exp: Experiment) -> pd.DataFrame:
    """Of the published networks and the dense one: the columns of `latency.measure`, and method, target and FLOPs."""
    rows = exp.networks[exp.networks.trial == 0]
    rows = rows.set_index(rows.method + "-" + rows.target.astype(str))

    def measured() -> dict[str, list]:
        networks = {name: exp.network(row.method, row.target) for name, row in rows.iterrows()} | {"dense": exp.model}
        networks = {name: network.to(exp.compute.device) for name, network in networks.items()}
        settings = exp.settings.latency
        times = latency.measure(networks, exp.settings.data.shape, settings.batches, exp.compute, settings.repetitions)
        return {"times": times.to_dict("records")}

    masks = {name: masks_digest(exp.select(row.method, row.target)) for name, row in rows.iterrows()}
    times = pd.DataFrame(measure(exp, latency_made_of(exp, masks), measured)["times"])
    pack(exp, exp.out)
    facts = rows[["method", "target", "flops"]]
    facts.loc["dense"] = ["dense", 1.0, exp.dense["flops"]]
    return times.join(facts, on="network")


def latency_made_of(exp: Experiment, masks: dict[str, str]) -> dict[str, Any]:
    """Times depend on the hardware, and on the precision that it chooses."""
    settings = as_written(exp.settings, {"model": True, "latency": True, "data": {"resolution"}})
    settings |= {"hardware": hardware(exp), "computed in": exp.compute.precision}
    return made_of(exp, "measurement", settings, {"masks": masks})
