"""Training and evaluation: one recipe, one loop, checkpoints that resume to the same result."""

import copy
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
from torch.optim.swa_utils import get_ema_multi_avg_fn

from legr.compute import Compute
from legr.data import Images
from legr.files import (
    Settings,
    UserError,
    code_digest,
    computation,
    load_state,
    save_state,
    source,
    state_path,
    tensors_digest,
)

Fraction = Annotated[float, Field(ge=0, le=1)]
Log = Callable[[dict[str, Any]], None]  # takes one row of numbers


class Recipe(Settings):
    """A training schedule for SGD; fractions are of the whole training.

    `schedule`: "step" multiplies the learning rate by `gamma` at each of `milestones` (the paper: 0.2 at 0.3,
    0.6 and 0.8); "exponential" multiplies it by `gamma` after each `every` epochs; "onecycle" rises linearly over
    `warmup`, then falls along a cosine to 0, step by step.
    `resolutions` is [[until, side], ...]: before the fraction `until`, images are shrunk to `side`.
    `ema`, if above 0, is the decay per step of a moving average of weights and BatchNorm statistics: the result.
    """

    epochs: PositiveInt
    batch_size: PositiveInt = 128
    lr: PositiveFloat
    momentum: Fraction = 0.9
    nesterov: bool = True
    weight_decay: NonNegativeFloat = 5e-4
    schedule: Literal["step", "exponential", "onecycle"] = "step"
    milestones: tuple[Fraction, ...] = (0.3, 0.6, 0.8)
    gamma: Fraction = 0.2
    every: PositiveFloat = 2.4
    warmup: Fraction = 0.2
    resolutions: tuple[tuple[Fraction, PositiveInt], ...] = ()
    label_smoothing: Fraction = 0.0
    ema: Fraction = 0.0

    def learning_rate(self, done: float) -> float:
        """The learning rate when the fraction `done` of the training is behind."""
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(done >= m for m in self.milestones)
        if self.schedule == "exponential":
            return self.lr * self.gamma ** math.floor(done * self.epochs / self.every + 1e-9)
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
        fused = any(p.is_cuda for p in model.parameters())  # reads the rate on the device
        return SGD(model.parameters(), self.lr, self.momentum, 0, self.weight_decay, nesterov, fused=fused)


def predict(model: nn.Module, images: Images, compute: Compute) -> Tensor:
    """Logits float32 [N, classes] in eval mode, on the CPU; the model's mode is restored.

    Raises:
        UserError: the network does not take these images, or gives other than logits [N, classes].
    """
    return torch.cat(_over_batches(model, images, compute, lambda logits, labels: logits.cpu()))


def evaluate(model: nn.Module, images: Images, compute: Compute) -> dict[str, float]:
    """Cross-entropy `loss` and `accuracy` (a fraction) in eval mode; errors are those of `predict`."""

    def sums(logits: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(logits, labels, reduction="sum")
        return torch.stack([loss.double(), (logits.argmax(1) == labels).sum().double()])

    loss, correct = torch.stack(_over_batches(model, images, compute, sums)).sum(0).tolist()
    return {"loss": loss / len(images), "accuracy": correct / len(images)}


def _over_batches(
    model: nn.Module, images: Images, compute: Compute, function: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """`function` of the logits and labels of each batch, in order, in eval mode; the model's mode is restored."""
    # A GPU takes large batches: with small ones it waits for the host, which launches some hundred kernels for each.
    size, most = _batch_size(images, 256 if images.device.type == "cpu" else 2500), int(images.labels.max())

    def judge(batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        with torch.inference_mode(), compute.autocast():
            return function(_logits(model, inputs, most), labels)

    threads = torch.get_num_threads()
    with _in_mode(model, training=False):
        if not isinstance(images, Images) or images.device.type != "cpu":
            return [judge(batch) for batch in images.batches(size)]
        # Small operations keep several cores busier than split up between them, and give the same bits.
        parts = [images[start : start + size] for start in range(0, len(images), size)]
        try:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                return list(pool.map(lambda part: judge(*part.batches(size)), parts))
        finally:
            torch.set_num_threads(threads)


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
def _in_one_sentence(failed: str) -> Iterator[None]:
    """Says that it `failed`, and why."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{failed}: {' '.join(str(error).split())[:300]}") from None


def _logits(model: nn.Module, inputs: Tensor, most: int) -> Tensor:
    """float32 [N, classes]. `most` is the largest label."""
    with _in_one_sentence(f"the network can't be run on images {list(inputs.shape[1:])}"):
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
    with _in_mode(model, training=True), torch.no_grad(), compute.autocast():
        momenta = {m: m.momentum for m in model.modules() if isinstance(m, _BatchNorm) and m.training}
        try:
            for module in momenta:
                module.reset_running_stats()
            for count, (inputs, _) in enumerate(images.batches(_batch_size(images, 250)), 1):
                for module in momenta:
                    module.momentum = 1 / count  # as None, for which every layer would wait for the device
                with _in_one_sentence(f"the network can't be run on images {list(inputs.shape[1:])}"):
                    model(_given(model, inputs))
        finally:
            for module, momentum in momenta.items():
                module.momentum = momentum


class Step:
    """Gradient steps of a network and what they add up to; none waits for the device.

    On CUDA the fourth step on inputs of a shape is recorded as a CUDA graph (forward and backward pass, SGD, moving
    average, sums), and this and further ones replay it: the host starts one graph in place of some thousand kernels.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, compute: Compute, most: int):
        self.model, self.recipe, self.compute, self.most = model, recipe, compute, most
        self.optimizer, self.calls = recipe.optimizer(model), 0  # calls with inputs of one shape
        self.result = copy.deepcopy(model) if recipe.ema else model  # what training makes
        self.sums = torch.zeros(2, dtype=torch.float64, device=compute.device)  # of losses and of right labels
        self.on_gpu = compute.device.startswith("cuda")
        self.rate = torch.zeros((), device=compute.device) if self.on_gpu else 0.0  # there, every replay reads it anew
        self.stream = torch.cuda.Stream(compute.device) if self.on_gpu and compute.graphs else None
        self.inputs = self.labels = self.graph = None

    def __call__(self, inputs: Tensor, labels: Tensor, rate: float) -> None:
        self.rate = self.rate.fill_(rate) if self.on_gpu else rate
        if self.stream is None:
            return self._take(inputs, labels)
        here = torch.cuda.current_stream(inputs.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            self._take_by_graph(inputs, labels)
        here.wait_stream(self.stream)

    def _take_by_graph(self, inputs: Tensor, labels: Tensor) -> None:
        if self.inputs is None or self.inputs.shape != inputs.shape:
            self.inputs, self.labels = torch.empty_like(inputs), torch.empty_like(labels)
            self.graph, self.calls = None, 0
        self.inputs.copy_(inputs)
        self.labels.copy_(labels)
        self.calls += 1
        if self.calls <= 3:  # in these, libraries set themselves up, which can't be recorded
            return self._take(self.inputs, self.labels)
        if self.graph is None:
            graph, failed = torch.cuda.CUDAGraph(), "a training step can't be recorded as a CUDA graph"
            # Other threads, which pin images, may go on meanwhile.
            recording = torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local")
            with _in_one_sentence(f"{failed}; set compute.graphs to false"), recording:
                self._take(self.inputs, self.labels)
            self.graph = graph
        self.graph.replay()

    def _take(self, inputs: Tensor, labels: Tensor) -> None:
        self.optimizer.param_groups[0]["lr"] = self.rate
        with self.compute.autocast():
            logits = _logits(self.model, inputs, self.most)
            loss = F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if self.recipe.ema:  # AveragedModel does the same and waits for the device
            average = get_ema_multi_avg_fn(self.recipe.ema)
            average(*(_floats(network) for network in (self.result, self.model)), None)
        self.sums += torch.stack([loss.detach() * len(labels), (logits.argmax(1) == labels).sum()])

    def epoch(self, batches: Iterable, rate: Callable[[int], float], seed: int) -> Tensor:
        """A step for each batch, at the learning rate of its number; mean loss and accuracy [2] over images."""
        seen = 0
        self.sums.zero_()
        torch.manual_seed(seed)  # for dropout, which draws from PyTorch's own generator
        self.model.train()
        with _strided_depthwise_in_float32(self.model, self.compute):
            for number, (inputs, labels) in enumerate(batches):
                self(inputs, labels, rate(number))
                seen += len(labels)
        return self.sums / seen


def _floats(model: nn.Module) -> list[Tensor]:
    """Weights and statistics, not counters."""
    return [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]


def take_steps(model: nn.Module, images: Images, recipe: Recipe, steps: int, compute: Compute, seed: int) -> None:
    """`steps` gradient steps in place at the constant rate `recipe.lr`: the τ̂ steps of the fitness (Eq. 3)."""
    generator = torch.Generator().manual_seed(seed)
    epochs = (images.augmented_batches(recipe.batch_size, generator) for _ in itertools.count())
    batches = itertools.islice(itertools.chain.from_iterable(epochs), steps)
    Step(model, recipe, compute, int(images.labels.max())).epoch(batches, lambda step: recipe.lr, seed)


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

    Crops of `ImageFiles` depend on the number of processes that decode them, too.

    Args:
        model: moved to the device, channels last.
        images: training images, on `compute.device`.
        state_folder: where a checkpoint is written after every epoch, under a name made of all that the result depends
            on, this library's code and what the network computes included; a training found there is continued.
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
        depends_on = [tensors_digest(model.state_dict()), images.digest(), images.augmentation.model_dump(), seed]
        depends_on += [recipe.model_dump(), compute.model_dump(), validation and validation.digest()]
        computed_by = [code_digest(), source(type(images)), computation(model)]
        checkpoint = state_path(state_folder, "training", depends_on, computed_by, ".pt")
        state = load_state(checkpoint)
    step, rows = Step(model, recipe, compute, int(images.labels.max())), []
    if state:
        step.model.load_state_dict(state["model"])
        step.result.load_state_dict(state["result"])
        step.optimizer.load_state_dict(state["optimizer"])
        rows = state["rows"]
    steps = max(len(images) // recipe.batch_size, 1)
    for epoch in range(len(rows), recipe.epochs):
        start = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        batches = images.augmented_batches(recipe.batch_size, generator, recipe.side(epoch))

        def rate(number: int, epoch: int = epoch) -> float:
            return recipe.learning_rate((epoch + number / steps) / recipe.epochs)

        train_loss, train_accuracy = step.epoch(batches, rate, generator.initial_seed()).tolist()
        if not math.isfinite(train_loss):
            what = f"the loss became {train_loss} in epoch {epoch + 1}"
            raise UserError(f"lr is {recipe.lr}; {what}, so it must be smaller")
        row = {"epoch": epoch + 1, "lr": rate(steps - 1)}
        row |= {"train_loss": train_loss, "train_accuracy": train_accuracy, "seconds": time.perf_counter() - start}
        if validation is not None:
            row |= {f"val_{name}": value for name, value in evaluate(step.result, validation, compute).items()}
        rows.append(row)
        if checkpoint:
            stateful = {"model": step.model, "result": step.result, "optimizer": step.optimizer}
            save_state(checkpoint, {name: part.state_dict() for name, part in stateful.items()} | {"rows": rows})
        if log:
            log(row)
    model.load_state_dict(step.result.state_dict())
    return pd.DataFrame(rows)


@contextmanager
def _strided_depthwise_in_float32(model: nn.Module, compute: Compute) -> Iterator[None]:
    """While it lasts: PyTorch's backward pass of these convolutions is slow on CPUs in bfloat16, not in float32."""
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    slow = [conv for conv in convs if conv.groups == conv.in_channels > 1 < max(conv.stride)]
    if not compute.device.startswith("cpu") or compute.precision != "bfloat16":
        slow = []
    for conv in slow:
        conv.forward = torch.amp.custom_fwd(conv.forward, device_type="cpu", cast_inputs=torch.float32)
    try:
        yield
    finally:
        for conv in slow:
            del conv.forward
