"""python -m benchmarks.gpu: does the GPU compute what the CPU does, and how fast? The last thing it prints is one JSON.

On a GPU it is also written to results/benchmarks/gpu.json. `--device cpu --tiny` tries it where there is none.
"""

import argparse
import json
import sys
import tempfile
import time
from contextlib import suppress

import pandas as pd
import torch
from torch import nn

import legr
from benchmarks.procedures import dense_network, pruned, random_images
from legr.data import Dataset, Images
from legr.files import tensors_digest, write_json
from legr.fitness import FitnessSettings
from legr.search import Evolution, SearchSettings
from legr.training import Compute, Recipe, evaluate, train

PATH, DENSE = "results/benchmarks/gpu.json", dense_network()


def network(flops: float, compute: Compute) -> nn.Module:
    return pruned(*DENSE, flops).to(compute.device, memory_format=torch.channels_last)


def trained(
    target: float, images: Images, compute: Compute, size: int, epochs: int, **options
) -> tuple[str, pd.DataFrame]:
    """The digest of the weights, and the history."""
    model, recipe = network(target, compute), Recipe(epochs=epochs, batch_size=size, lr=0.01)
    history = train(model, images.to(compute.device), recipe, compute, seed=0, **options)
    return tensors_digest(model.state_dict()), history


def selections(images: Images, here: Compute, there: Compute, *_) -> dict:
    norms = [legr.filter_norms(network(1.0, compute), DENSE[1]) for compute in (here, there)]
    search = Evolution(norms[0], SearchSettings(population=61, evaluations=61))
    rankings = [DENSE[2], *(search.ask() for _ in range(61))]  # random ones, and norm-only
    cuts = [[legr.select(DENSE[1], r.scores(n), t) for n in norms] for r in rankings for t in (0.7, 0.47, 0.3)]
    same = sum(all(map(torch.equal, *cut)) for cut in cuts)
    return {"fine": same == len(cuts), "identical": same, "of": len(cuts)}


def losses(images: Images, here: Compute, there: Compute, fast: Compute, size: int) -> dict:
    """Relative to the CPU's: of evaluation, and the largest of 20 training steps on one batch over their mean."""
    some, few, computes = images[: 4 * size], images[: size // 2], (here, there, fast)
    found = [evaluate(network(0.7, compute), some.to(compute.device), compute)["loss"] for compute in computes]
    steps = [trained(0.7, few, compute, len(few), 20)[1].train_loss for compute in computes]
    off = {name: loss / found[0] - 1 for name, loss in zip(("float32", "bfloat16"), found[1:], strict=True)}
    over = [float((other - steps[0]).abs().max() / steps[0].mean()) for other in steps[1:]]
    return {"fine": abs(off["float32"]) < 1e-3 and over[0] < 0.05, "evaluation": off, "training": over}


def bits(images: Images, here: Compute, there: Compute, fast: Compute, size: int) -> dict:
    """Of three epochs: once more; stopped after the first and resumed; without graphs."""
    few, plain = images[: 5 * size], fast.model_copy(update={"graphs": False})
    first, again, without = (trained(0.47, few, compute, size, 3)[0] for compute in (fast, fast, plain))
    with tempfile.TemporaryDirectory() as folder:
        with suppress(ZeroDivisionError):
            trained(0.47, few, fast, size, 3, state_folder=folder, log=lambda row: 1 / 0)
        resumed = trained(0.47, few, fast, size, 3, state_folder=folder)[0]
    same = {"again": again == first, "resumed": resumed == first, "without graphs": without == first}
    return {"fine": all(same.values()), **same}


def search(images: Images, here: Compute, there: Compute, fast: Compute, size: int) -> dict:
    held, found, seconds = torch.arange(len(images) // 10), [], {}
    data = Dataset("random", list("0123456789"), images, held, images[:8])
    settings = SearchSettings(population=6, evaluations=20 if size > 16 else 8, sample=2)
    kinds = {"CPU": (here, {}), "as pruned": (there, {}), "recalibrated": (fast, {"recalibration_images": 1500})}
    for name, (compute, kind) in (kinds | {"50 steps": (fast, {"steps": 50 if size > 16 else 4})}).items():
        fitness = FitnessSettings(batch_size=size // 2, **kind)
        found.append(legr.learn_ranking(*DENSE[:2], data, 0.7, search=settings, fitness=fitness, compute=compute))
        seconds[name] = float(found[-1].history.seconds.median())
    same, loss = found[0].candidates == found[1].candidates, [result.history.loss for result in found]
    off = float((loss[1] / loss[0] - 1).abs().max())
    return {"fine": same and off < 1e-3, "relative": off, f"seconds a candidate on {len(held)} images": seconds}


def images_a_second(images: Images, here: Compute, there: Compute, fast: Compute, size: int) -> dict:
    """The second of two epochs or evaluations."""
    found, images = {}, images.to(fast.device)
    for target in (1.0, 0.47):
        for name, compute in (("graph", fast), ("plain", fast.model_copy(update={"graphs": False}))):
            found[f"training {target}, {name}"] = len(images) / trained(target, images, compute, size, 2)[1].seconds[1]
        model = network(target, fast)
        ends = [evaluate(model, images, fast) and time.perf_counter() for _ in range(2)]
        found[f"evaluation {target}"] = len(images) / (ends[1] - ends[0])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    device, tiny = vars(parser.parse_args()).values()
    kinds, size = (("cpu", "float32"), (device, "float32"), (device, "bfloat16")), 16 if tiny else 256
    try:
        computes = [Compute(device=where, precision=precision).resolve() for where, precision in kinds]
    except legr.UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    torch.backends.cudnn.allow_tf32 = False
    images = random_images(size * (4 if tiny else 100), "cpu")
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    found = {"device": name, "tiny": tiny, "batch": size, "torch": torch.__version__, "fine": True}
    for check in (selections, losses, bits, search, images_a_second):
        try:
            found[check.__name__] = check(images, *computes, size)
        except Exception as error:  # the others may still tell something
            found[check.__name__] = {"fine": False, "error": f"{type(error).__name__}: {error}"[:500]}
        found["fine"] &= found[check.__name__].get("fine", True)
        print(f"{check.__name__}: {found[check.__name__]}", file=sys.stderr, flush=True)
        if name != "cpu" and not tiny:
            write_json(PATH, found)  # after each check: time on a GPU may be up
    print(json.dumps(found, indent=1))
    return int(not found["fine"])


if __name__ == "__main__":
    sys.exit(main())
