"""Fine-tuning on several GPUs or machines, before notebook 3 runs:

    torchrun --nproc-per-node 4 -m experiments.finetune --scale paper --experiment imagenet-mobilenetv2 \\
        --method legr --target 0.5

Every process takes its share of each batch. The trained state lies where `dvc repro` looks for interrupted
work, so that the stage that makes this network finds its training finished, evaluates it and records the
result. Run under the same conditions: the same parameters, code and kind of device. Several machines must
share the project's folder.
"""

import argparse
import sys

import torch

import legr
from experiments.config import Workspace, workspace
from experiments.progress import Log
from legr import data, distributed, models, training
from legr.errors import UserError
from legr.ranking import select_by


def finetune(space: Workspace, method: str, target: float) -> None:
    """Train what notebook 3 would, for all seeds, and leave the state for it."""
    settings = space.settings
    compute = settings.compute.resolve()
    images = data.load(space.images)
    training_images = images.train.to(compute.device)
    example = torch.zeros(1, 3, settings.data.resolution, settings.data.resolution)
    model = models.build(settings.model, len(images.classes), settings.baseline.seed)
    models.load_weights(model, space.baseline)
    graph = legr.trace(model, example)
    ranking = legr.Ranking.load(space.ranking(method)) if method in settings.search.rankings else None
    kept = select_by(method, graph, legr.filter_norms(model, graph), ranking, target)
    state = space.stage_state(f"3_prune-{method}-{target}")
    recipe = settings.finetune.recipe
    for seed in settings.finetune.seeds:
        first = distributed.share()[0] == 0
        log = Log(f"{method} {target} seed {seed}", recipe.epochs, "train_loss", "train_accuracy") if first else None
        small = legr.prune(model, graph, kept)
        training.train(small, training_images, recipe, compute, seed=seed, state_folder=state, log=log)


def main() -> int:
    parser = argparse.ArgumentParser(prog="torchrun -m experiments.finetune", description=__doc__)
    parser.add_argument("--scale", required=True)
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--target", required=True, type=float)
    arguments = parser.parse_args()
    try:
        distributed.join()
        finetune(workspace(arguments.scale, arguments.experiment), arguments.method, arguments.target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        distributed.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
