"""Training in several processes under torchrun: each takes its share of every batch; BatchNorm sees the whole batch."""

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel

from legr.errors import UserError


def join() -> None:
    """Join the processes that torchrun started; does nothing in a process of its own."""
    if "WORLD_SIZE" in os.environ and not distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")


def leave() -> None:
    if distributed.is_initialized():
        distributed.destroy_process_group()


def share() -> tuple[int, int]:
    """(rank, world): which process this is, of how many; (0, 1) without torchrun."""
    return (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)


def check_batch_size(size: int) -> None:
    """Raises UserError where a batch can't be shared evenly."""
    if size % share()[1]:
        raise UserError(f"batch_size is {size}; it must be a multiple of {share()[1]}, the number of processes")


def total(value: Tensor) -> Tensor:
    """The sum of `value` over all processes."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value


def from_first(make: Callable[[], Any]) -> Any:
    """What `make` returns in the first process, for all of them."""
    result = [make() if share()[0] == 0 else None]
    if distributed.is_initialized():
        distributed.broadcast_object_list(result)
    return result[0]


def replica(model: nn.Module) -> nn.Module:
    """A copy of `model` that averages gradients over the processes; the model itself where there is only one."""
    if share()[1] == 1:
        return model
    model = copy.deepcopy(model)
    if next(model.parameters()).is_cuda:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = _SyncedBatchNorm2d
    return DistributedDataParallel(model)


class _SyncedBatchNorm2d(nn.BatchNorm2d):
    """nn.SyncBatchNorm for CPU tensors, which PyTorch's own refuses; equal shares are assumed."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        world, wide = share()[1], x.float()
        mean = all_reduce(wide.mean((0, 2, 3))) / world
        centred = wide - mean[:, None, None]
        variance = all_reduce(centred.square().mean((0, 2, 3))) / world
        with torch.no_grad():
            count = world * x.numel() / x.shape[1]
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
            self.num_batches_tracked.add_(1)
        out = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        return (out * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)
