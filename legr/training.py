"""Training and evaluation: one recipe, one loop, per-epoch checkpoints that resume to the same result."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from legr import distributed
from legr.data import Files, Images, augmented_batches, batches
from legr.depthwise import fast_backward
from legr.errors import UserError
from legr.files import digest
from legr.state import load_state, save_state, tensors_digest

Fraction = Annotated[float, Field(ge=0, le=1)]


class Recipe(BaseModel):
    """A training schedule: SGD with Nesterov momentum, random crops and flips.

    `schedule: step` multiplies the learning rate by `gamma` when the fractions of training in
    `milestones` are reached (the paper: 0.3, 0.6, 0.8 with 0.2). `schedule: onecycle` rises linearly
    over the fraction `warmup`, then falls along a cosine to 0, step by step.
    `flip: false` is for images that mean something else mirrored, such as digits.
    `crop` is "pad" (CIFAR-10's) or "resized" (ImageNet's, of at least `min_area` of the image), see
    `data.augmented_batches`.
    `resolutions` is [[until, side], ...]: epochs before the fraction `until` see images shrunk to `side`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    epochs: PositiveInt
    batch_size: PositiveInt = 128
    lr: PositiveFloat
    momentum: Fraction = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    schedule: Literal["step", "onecycle"] = "step"
    milestones: tuple[Fraction, ...] = (0.3, 0.6, 0.8)
    gamma: Fraction = 0.2
    warmup: Fraction = 0.2
    flip: bool = True
    crop: Literal["pad", "resized"] = "pad"
    min_area: Annotated[float, Field(gt=0, le=1)] = 0.08
    resolutions: tuple[tuple[Fraction, PositiveInt], ...] = ()

    def learning_rate(self, done: float) -> float:
        """The learning rate when the fraction `done` of the training is behind."""
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(done >= m for m in self.milestones)
        if done < self.warmup:
            return self.lr * done / self.warmup
        falling = (done - self.warmup) / max(1 - self.warmup, 1e-9)
        return self.lr * 0.5 * (1 + torch.cos(torch.tensor(falling * torch.pi)).item())

    def resolution(self, epoch: int) -> int | None:
        """The side to which images are shrunk in `epoch`; None: as they are."""
        return next((side for until, side in self.resolutions if epoch < until * self.epochs), None)


class Compute(BaseModel):
    """Where and in which precision: `auto` takes a GPU, and bfloat16 where the processor has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = "auto"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    threads: PositiveInt | None = None

    def resolve(self) -> "Compute":
        """The same with `auto` replaced by what this machine has."""
        device = self.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            raise UserError(
                f"device is {device!r}; this machine can't use it (auto, cpu, or cuda with a GPU)"
            ) from None
        precision = self.precision
        if precision == "auto":
            if device.startswith("cuda"):
                fast = torch.cuda.is_bf16_supported()
            else:
                fast = torch.cpu._is_avx512_bf16_supported()
            precision = "bfloat16" if fast else "float32"
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        return Compute(device=device, precision=precision, threads=torch.get_num_threads())

    def identity(self) -> list[str]:
        """What of this a result depends on beyond rounding."""
        return [self.device.split(":")[0], self.precision]

    @property
    def dtype(self) -> torch.dtype:
        """What convolutions compute in."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bfloat16")


def evaluate(
    model: nn.Module, images: Images | Files, compute: Compute, batch_size: int | None = None
) -> dict[str, float]:
    """Cross-entropy `loss` and `accuracy` (a fraction) in eval mode; the model's mode is restored.

    Under torchrun each process takes its share of the images, and all get the result.
    """
    rank, world = distributed.share()
    losses, right = image_losses(model, images[rank::world], compute, batch_size)
    sums = torch.stack([losses.double().sum(), right.double().sum()]).to(images.device)
    loss, correct = distributed.total(sums).tolist()
    return {"loss": loss / len(images), "accuracy": correct / len(images)}


def image_losses(
    model: nn.Module, images: Images | Files, compute: Compute, batch_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Of each image the cross-entropy, float32 [N], and whether the class is right, bool [N]; as `evaluate` does it."""
    on_cpu, was_training = images.device.type == "cpu", model.training
    size = batch_size or _batch_size(images, 128 if on_cpu else 500)
    if on_cpu and not batch_size:
        size = min(size, max(len(images) // 4, 32))  # few images still make work for several threads

    def judge(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(), compute.autocast():
            logits = model(inputs).float()
            return F.cross_entropy(logits, labels, reduction="none"), logits.argmax(1) == labels

    model.eval()
    parts = _of_each_batch(judge, images, size)
    model.train(was_training)
    losses, right = map(torch.cat, zip(*parts, strict=True))
    return losses, right


def _of_each_batch(function: Callable[[Tensor, Tensor], Any], images: Images | Files, size: int) -> list:
    """`function(inputs, labels)` of every batch, in order.

    On a CPU every thread computes batches of its own: small operations keep more cores busy so than split up
    between them, and the number of threads does not change a bit.
    """
    if images.device.type != "cpu" or not isinstance(images, Images):
        return [function(*batch) for batch in batches(images, size)]

    def alone(start: int) -> Any:
        torch.set_num_threads(1)  # of this thread's operations
        return function(*next(batches(images[start : start + size], size)))

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(alone, range(0, len(images), size)))
    finally:
        torch.set_num_threads(threads)


def _batch_size(images: Images | Files, at_32: int) -> int:
    """Feature maps of larger images take more memory: at 128 pixels a quarter as many as at 32."""
    return max(at_32 * 32 // max(images.side, 32), 1)


def recalibrate(model: nn.Module, images: Images | Files, compute: Compute, batch_size: int | None = None) -> None:
    """Re-estimate BatchNorm statistics as their average over the batches of `images`; weights are untouched."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = [norm for norm in norms if norm.running_mean is not None]
    was_training, here = model.training, threading.local()

    def normalize(norm: nn.Module, x: Tensor) -> Tensor:
        """By the batch's own statistics, which are noted and not stored: several batches may be on their way."""
        y, mean, scale = torch.native_batch_norm(x, norm.weight, norm.bias, None, None, True, 0.0, norm.eps)
        count = x.numel() // x.shape[1]
        variance = (scale.float() ** -2 - norm.eps).clamp(min=0) * count / max(count - 1, 1)
        here.found[norm].append(torch.stack([mean.float(), variance]))
        return y

    def statistics(inputs: Tensor, _: Tensor) -> dict[nn.Module, list[Tensor]]:
        here.found = {norm: [] for norm in norms}
        with torch.inference_mode(), compute.autocast():
            model(inputs)
        return here.found

    model.train()
    try:
        for norm in norms:
            norm.forward = partial(normalize, norm)
        found = _of_each_batch(statistics, images, batch_size or _batch_size(images, 250))
    finally:
        for norm in norms:
            del norm.forward
        model.train(was_training)
    for norm in norms:
        seen = [moments for batch in found for moments in batch[norm]]
        norm.reset_running_stats()
        if seen:
            mean, variance = torch.stack(seen).mean(0)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)
            norm.num_batches_tracked.fill_(len(seen))


def train(
    model: nn.Module,
    images: Images | Files,
    recipe: Recipe,
    compute: Compute,
    *,
    seed: int,
    state_folder: str | Path | None = None,
    validation: Images | Files | None = None,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> pd.DataFrame:
    """Train `model` in place; epoch e depends on (seed, e) alone, so a resumed run ends the same.

    Args:
        model: moved to the device, channels last.
        images: training images, on `compute.device`.
        state_folder: where a checkpoint is written after every epoch, under a name made of
            everything that the result depends on; a training found there is continued.
        validation: evaluated after every epoch when given.
        log: called with every finished epoch's row.

    Returns:
        One row per epoch: epoch, lr, train_loss, train_accuracy, seconds, and val_loss,
        val_accuracy where `validation` is given.
    """
    rank, world = distributed.share()
    distributed.check_batch_size(recipe.batch_size)
    model.to(compute.device, memory_format=torch.channels_last)
    checkpoint = state = None
    if state_folder is not None:
        given = [tensors_digest(model.state_dict()), images.digest(), seed, validation is not None]
        checkpoint = Path(state_folder) / f"train-{digest([*given, recipe.model_dump(), compute.identity()])}.pt"
        state = distributed.from_first(lambda: load_state(checkpoint))
    if state:
        model.load_state_dict(state["model"])
    network = distributed.replica(model)  # the model itself, unless torchrun started several processes
    optimizer = torch.optim.SGD(
        network.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.momentum > 0,
        weight_decay=recipe.weight_decay,
    )
    if state:
        optimizer.load_state_dict(state["optimizer"])
    rows: list[dict[str, Any]] = state["rows"] if state else []
    for epoch in range(len(rows), recipe.epochs):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        steps = max(len(images) // recipe.batch_size, 1)
        network.train()
        loss_sum = torch.zeros((), device=compute.device)
        correct = torch.zeros((), dtype=torch.int64, device=compute.device)
        epoch_batches = augmented_batches(
            images,
            recipe.batch_size,
            generator,
            recipe.resolution(epoch),
            recipe.flip,
            recipe.crop,
            recipe.min_area,
            (rank, world),
        )
        with fast_backward(network, compute.precision == "bfloat16"):
            for step, (inputs, labels) in enumerate(epoch_batches):
                rate = recipe.learning_rate((epoch + step / steps) / recipe.epochs)
                optimizer.param_groups[0]["lr"] = rate
                with compute.autocast():
                    logits = network(inputs).float()
                    loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                loss_sum += loss.detach()
                correct += (logits.argmax(1) == labels).sum()
        seen = steps * min(recipe.batch_size, len(images))
        row = {
            "epoch": epoch + 1,
            "lr": rate,
            "train_loss": distributed.total(loss_sum).item() / steps / world,
            "train_accuracy": distributed.total(correct).item() / seen,
        }
        if not torch.isfinite(loss_sum):
            raise UserError(
                f"lr is {recipe.lr}; the loss became {row['train_loss']} in epoch {epoch + 1}, so it must be smaller"
            )
        row["seconds"] = time.perf_counter() - start
        if network is not model:
            model.load_state_dict(network.module.state_dict())
        if validation is not None:
            found = evaluate(model, validation, compute)
            row |= {"val_loss": found["loss"], "val_accuracy": found["accuracy"]}
        rows.append(row)
        if checkpoint and rank == 0:
            save_state(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows})
        if log and rank == 0:
            log(row)
    return pd.DataFrame(rows)
