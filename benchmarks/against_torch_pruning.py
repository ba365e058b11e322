"""python -m benchmarks.against_torch_pruning: the same weights, FLOPs and fine-tuning, here and by Torch-Pruning.

CIFAR-10's ResNet-56 of the committed results, cut to 47% of its FLOPs. Of LeGR the time is that of cutting by a ranking
that is learned already. Needs `pip install torch-pruning` and the laptop scale's images (its data stage). Writes
results/benchmarks/torch-pruning.csv; an interrupted run goes on where it was.
"""

import argparse
import importlib.metadata
import time
from pathlib import Path

import pandas as pd
import torch
from torch import nn

import legr
from benchmarks.networks import multiply_accumulates
from experiments.config import workspace
from legr import data, models
from legr.errors import UserError
from legr.files import write_json, write_text
from legr.latency import measure
from legr.ranking import select_by
from legr.training import Compute, evaluate, recalibrate, train

RESULTS = Path("results/benchmarks")
FRACTION = 0.47
METHODS = (("Torch-Pruning", 1), ("legr", 1), ("norm", 1), ("uniform", 1), ("legr", 8), ("legr", 16))  # and `round_to`


def by_torch_pruning(model: nn.Module) -> nn.Module:
    """By norm over all layers, a hundredth of the filters at a time, until the FLOPs are below the target."""
    import torch_pruning

    example = torch.zeros(1, 3, 32, 32)
    target = FRACTION * multiply_accumulates(model, example)
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        torch_pruning.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        iterative_steps=100,
        ignored_layers=[model.linear],
    )
    while multiply_accumulates(model, example) >= target:
        pruner.step()
    return model


def cut(method: str, round_to: int, weights: Path, ranking: legr.Ranking) -> tuple[nn.Module, float]:
    """The pruned network, and the seconds that cutting took, from the loaded network on."""
    model = models.load_weights(models.resnet56(), weights).eval()
    start = time.perf_counter()
    if method == "Torch-Pruning":
        small = by_torch_pruning(model)
    else:
        graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
        norms = legr.filter_norms(model, graph)
        small = legr.prune(model, graph, select_by(method, graph, norms, ranking, FRACTION, round_to=round_to))
    return small, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against_torch_pruning", description=__doc__)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=50_000, help="training images of an epoch")
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    compute = Compute().resolve()
    try:
        space = workspace("laptop", "cifar10-resnet56")
        images = data.load(space.images).to(compute.device)
    except UserError as error:
        parser.exit(1, f"error: {error}\n")
    recipe = space.settings.finetune.recipe.model_copy(update={"epochs": arguments.epochs})
    order = torch.randperm(len(images.train), generator=torch.Generator().manual_seed(0))[: arguments.images]
    fitting, example = images.train[order], torch.zeros(1, 3, 32, 32)
    ranking = legr.Ranking.load(space.ranking("legr"))
    dense = models.load_weights(models.resnet56(), space.baseline).eval()
    rows, networks = [], {("dense", 1): dense}
    for method, round_to in METHODS:
        small, seconds = cut(method, round_to, space.baseline, ranking)
        networks[method, round_to] = small
        row = {
            "method": method,
            "round_to": round_to,
            "seconds_to_cut": seconds,
            "flops_ratio": multiply_accumulates(small, example) / multiply_accumulates(dense, example),
            "params": sum(p.numel() for p in small.parameters()),
            "as_cut": evaluate(small, images.test, compute)["accuracy"],
        }
        again, _ = cut(method, round_to, space.baseline, ranking)
        recalibrate(again, images.fit[order[order < len(images.fit)][:1500]], compute)
        row["recalibrated"] = evaluate(again, images.test, compute)["accuracy"]
        for seed in range(arguments.seeds):
            tuned, _ = cut(method, round_to, space.baseline, ranking)
            train(tuned, fitting, recipe, compute, seed=seed, state_folder=space.state / "torch-pruning")
            accuracy = evaluate(tuned, images.test, compute)["accuracy"]
            rows.append(row | {"seed": seed, "fine_tuned": accuracy})
            print(pd.DataFrame(rows[-1:]).round(4).to_string(index=False), flush=True)
    times = measure(networks, 32, (1, 128), compute, 20)
    taken = dict(zip(zip(times.network, times.batch, strict=True), times.latency_ms, strict=True))
    table = pd.DataFrame(rows)
    for batch in times.batch.unique():
        keys = zip(table.method, table.round_to, strict=True)
        table[f"latency_ratio_{batch}"] = [taken[key, batch] / taken[("dense", 1), batch] for key in keys]
    write_text(RESULTS / "torch-pruning.csv", table.to_csv(index=False, float_format="%.5g"))
    about = {
        "torch_pruning": importlib.metadata.version("torch-pruning"),
        "epochs": arguments.epochs,
        "images": len(fitting),
        "device": compute.device,
        "precision": compute.precision,
        "threads": compute.threads,
    }
    write_json(RESULTS / "torch-pruning.json", about)
    print(table.round(4).to_string(index=False))


if __name__ == "__main__":
    main()
