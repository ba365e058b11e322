"""Training and evaluation: one recipe, one loop, checkpoints that resume to the same result."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import SGD
from torch.optim.swa_utils import update_bn

from legr.data import Images
from legr.files import Settings, UserError, digest, load_state, save_state, tensors_digest

Fraction = Annotated[float, Field(ge=0, le=1)]
Log = Callable[[dict[str, Any]], None]  # takes one row of numbers


class Recipe(Settings):
    """A training schedule for SGD; fractions are of the whole training.

    `schedule`: "step" multiplies the learning rate by `gamma` at each of `milestones` (the paper: 0.2 at 0.3,
    0.6 and 0.8); "onecycle" rises linearly over `warmup`, then falls along a cosine to 0, step by step.
    `resolutions` is [[until, side], ...]: before the fraction `until`, images are shrunk to `side`.
    """

    epochs: PositiveInt
    batch_size: PositiveInt = 128
    lr: PositiveFloat
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NonNegativeFloat = 5e-4
    schedule: Literal["step", "onecycle"] = "step"
    milestones: tuple[Fraction, ...] = (0.3, 0.6, 0.8)
    gamma: Fraction = 0.2
    warmup: Fraction = 0.2
    resolutions: tuple[tuple[Fraction, PositiveInt], ...] = ()

    def learning_rate(self, done: float) -> float:
        """The learning rate when the fraction `done` of the training is behind."""
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(done >= m for m in self.milestones)
        if done < self.warmup:
            return self.lr * done / self.warmup
        falling = (done - self.warmup) / max(1 - self.warmup, 1e-9)
        return self.lr * 0.5 * (1 + torch.cos(torch.tensor(falling * torch.pi)).item())

    def side(self, epoch: int) -> int | None:
        """The side to which images are shrunk in `epoch`; None: as they are."""
        return next((side for until, side in self.resolutions if epoch < until * self.epochs), None)

    def optimizer(self, model: nn.Module) -> SGD:
        if other := [p.dtype for p in model.parameters() if p.dtype != torch.float32]:
            raise UserError(
                f"the network has weights of type {other[0]}; it is trained in float32: hand in model.float()"
            )
        nesterov = self.nesterov and self.momentum > 0
        return SGD(model.parameters(), self.lr, self.momentum, 0, self.weight_decay, nesterov)


class Compute(Settings):
    """Where and in which precision: `auto` takes a GPU, and bfloat16 where the processor has it."""

    device: str = "auto"
    precision: Literal["auto", "bfloat16", "float32"] = "auto"

    def resolve(self) -> "Compute":
        """The same with `auto` replaced by what this machine has."""
        device, precision = self.device, self.precision
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError):
            allowed = "auto, cpu, or cuda with a GPU"
            raise UserError(f"device is {device!r}; this machine can't use it ({allowed})") from None
        if precision == "auto":
            on_gpu = device.startswith("cuda")
            fast = torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()
            precision = "bfloat16" if fast else "float32"
        return Compute(device=device, precision=precision)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=self.precision == "bfloat16")

    def identity(self) -> list[str]:
        """What of this a result depends on beyond rounding."""
        return [self.device.split(":")[0], self.precision]


def evaluate(model: nn.Module, images: Images, compute: Compute) -> dict[str, float]:
    """Cross-entropy `loss` and `accuracy` (a fraction) in eval mode; the model's mode is restored.

    Raises:
        UserError: the network does not take these images, or gives other than logits [N, classes].
    """
    size, most = _batch_size(images, 256 if images.device.type == "cpu" else 500), int(images.labels.max())

    def sums(batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        with torch.inference_mode(), compute.autocast():
            logits = _logits(model, inputs, most)
            loss = F.cross_entropy(logits, labels, reduction="sum")
            return torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()])

    threads = torch.get_num_threads()
    with _in_mode(model, training=False):
        if isinstance(images, Images) and images.device.type == "cpu":
            # Small operations keep several cores busier than split up between them, and give the same bits.
            starts = range(0, len(images), size)
            try:
                with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                    parts = list(pool.map(lambda i: sums(*images[i : i + size].batches(size)), starts))
            finally:
                torch.set_num_threads(threads)
        else:
            parts = [sums(batch) for batch in images.batches(size)]
    loss, correct = torch.stack(parts).sum(0).tolist()
    return {"loss": loss / len(images), "accuracy": correct / len(images)}


def _batch_size(images: Images, at_32: int) -> int:
    """`at_32` at 32×32 pixels; less for larger images, whose feature maps take more memory."""
    _, height, width = images.shape
    return max(int(at_32 * 32 / max(math.sqrt(height * width), 32)), 1)


@contextmanager
def _in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """While it lasts; then every module has its mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _given(model: nn.Module, inputs: Tensor) -> Tensor:
    """Inputs in the type of the network's weights."""
    return inputs.to(next((p.dtype for p in model.parameters()), torch.float32))


@contextmanager
def _in_one_sentence(images: str) -> Iterator[None]:
    """Says it where a network does not take `images`."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"the network can't be run on {images}: {' '.join(str(error).split())[:300]}") from None


def _logits(model: nn.Module, inputs: Tensor, most: int) -> Tensor:
    """float32 [N, classes]. `most` is the largest label."""
    with _in_one_sentence(f"images {list(inputs.shape[1:])}"):
        logits = model(_given(model, inputs))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        outputs = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise UserError(
            f"the network gives {outputs} for images {list(inputs.shape)}; it must give logits [N, classes]"
        )
    if logits.shape[1] <= most:
        raise UserError(f"the network has {logits.shape[1]} outputs; labels of the images go up to {most}")
    return logits.float()


def recalibrate(model: nn.Module, images: Images, compute: Compute) -> None:
    """Re-estimate BatchNorm statistics as their average over the batches of `images`; weights are untouched.

    Statistics of a BatchNorm that stays in eval mode when the network is trained are left as they are.
    """
    with _in_mode(model, training=True), compute.autocast(), _in_one_sentence(f"images {list(images.shape)}"):
        frozen = [m for m in model.modules() if isinstance(m, _BatchNorm) and not m.training]
        for module in frozen:
            module.track_running_stats = False  # so update_bn does not reset them; eval mode uses them all the same
        update_bn((_given(model, inputs) for inputs, _ in images.batches(_batch_size(images, 250))), model)
        for module in frozen:
            module.track_running_stats = True


def take_steps(model: nn.Module, images: Images, recipe: Recipe, steps: int, compute: Compute, seed: int) -> None:
    """`steps` gradient steps in place at the constant rate `recipe.lr`: the τ̂ steps of the fitness (Eq. 3)."""
    generator = torch.Generator().manual_seed(seed)
    epochs = (images.augmented_batches(recipe.batch_size, generator) for _ in itertools.count())
    batches = itertools.islice(itertools.chain.from_iterable(epochs), steps)
    _descend(model, recipe.optimizer(model), batches, lambda step: recipe.lr, compute, seed, int(images.labels.max()))


def _descend(
    model: nn.Module,
    optimizer: SGD,
    batches: Iterable,
    rate: Callable[[int], float],
    compute: Compute,
    seed: int,
    most: int,
) -> Tensor:
    """A gradient step for each batch, at the learning rate of its number; the mean loss and accuracy [2] over images.

    They stay on the device, where no step waits for them.
    """
    sums, seen = torch.zeros(2, dtype=torch.float64, device=compute.device), 0
    torch.manual_seed(seed)  # for dropout, which draws from PyTorch's own generator
    model.train()
    with _strided_depthwise_in_float32(model, compute):
        for step, (inputs, labels) in enumerate(batches):
            optimizer.param_groups[0]["lr"] = rate(step)
            with compute.autocast():
                logits = _logits(model, inputs, most)
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])
            seen += len(labels)
    return sums / seen


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    compute: Compute,
    *,
    seed: int,
    state_folder: str | Path | None = None,
    validation: Images | None = None,
    log: Log | None = None,
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

    Raises:
        UserError: the loss is no longer finite.
    """
    model.to(compute.device, memory_format=torch.channels_last)
    checkpoint = state = None
    if state_folder is not None:
        given = [tensors_digest(model.state_dict()), images.digest(), images.augmentation.model_dump()]
        given += [seed, validation is not None, recipe.model_dump(), compute.identity()]
        checkpoint = Path(state_folder) / f"train-{digest(given)}.pt"
        state = load_state(checkpoint)
    optimizer, rows = recipe.optimizer(model), []
    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        rows = state["rows"]
    steps, most = max(len(images) // recipe.batch_size, 1), int(images.labels.max())
    for epoch in range(len(rows), recipe.epochs):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        batches = images.augmented_batches(recipe.batch_size, generator, recipe.side(epoch))

        def rate(step: int, epoch: int = epoch) -> float:
            return recipe.learning_rate((epoch + step / steps) / recipe.epochs)

        means = _descend(model, optimizer, batches, rate, compute, generator.initial_seed(), most)
        train_loss, train_accuracy = means.tolist()
        if not math.isfinite(train_loss):
            what = f"the loss became {train_loss} in epoch {epoch + 1}"
            raise UserError(f"lr is {recipe.lr}; {what}, so it must be smaller")
        row = {"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"]}
        row |= {"train_loss": train_loss, "train_accuracy": train_accuracy, "seconds": time.perf_counter() - start}
        if validation is not None:
            row |= {f"val_{name}": value for name, value in evaluate(model, validation, compute).items()}
        rows.append(row)
        if checkpoint:
            save_state(checkpoint, {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rows": rows})
        if log:
            log(row)
    return pd.DataFrame(rows)


@contextmanager
def _strided_depthwise_in_float32(model: nn.Module, compute: Compute) -> Iterator[None]:
    """While it lasts: PyTorch's backward pass of these convolutions is slow on CPUs in bfloat16, not in float32."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    slow = [conv for conv in convs if conv.groups == conv.in_channels > 1 < max(conv.stride)]
    if compute.identity() != ["cpu", "bfloat16"]:
        slow = []
    for conv in slow:
        conv.forward = torch.amp.custom_fwd(conv.forward, device_type="cpu", cast_inputs=torch.float32)
    try:
        yield
    finally:
        for conv in slow:
            del conv.forward
