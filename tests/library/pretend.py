"""A pretend GPU: CPU tensors whose storages are marked as being on cuda:0.

Tensors of two devices in one operation raise, as on a GPU; so does what makes the host wait for the device while a
CUDA graph is recorded. Graphs record operations with the tensors that they read and write; a replay does the same
operations on the same tensors again, and what was not an operation on the device, such as a number computed by Python,
stays as it was.
"""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import ClassVar
from unittest.mock import patch

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
WAITING = {"_local_scalar_dense", "nonzero", "is_nonzero", "_unique2", "masked_select", "equal", "unique_dim"}


def tensors(values):
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def storage(tensor):
    with torch._C.DisableTorchFunction():
        return tensor.untyped_storage()


class Graph:
    """For torch.cuda.CUDAGraph."""

    def __init__(self):
        self.operations, self.before, self.made = [], {}, set()

    def record(self, func, args, kwargs):
        for owned in map(storage, tensors((args, kwargs))):
            if owned._cdata not in self.made:
                self.before.setdefault(owned._cdata, (owned, owned.clone()))
        out = func(*args, **kwargs)
        self.made |= {storage(t)._cdata for t in tensors(out)} - self.before.keys()
        self.operations.append((func, args, kwargs, out))
        return out

    def undo(self):
        """Recording computes nothing on a GPU."""
        for owned, values in self.before.values():
            owned.copy_(values)

    def replay(self):
        with _disable_current_modes(), torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, out in self.operations:
                for old, new in zip(tensors(out), tensors(func(*args, **kwargs)), strict=True):
                    if storage(old)._cdata != storage(new)._cdata:  # neither in place nor a view
                        old.copy_(new)


class PretendGpu(TorchDispatchMode):
    marked: ClassVar = {}  # by address; one GPU for all tests, as constants are kept on their device

    def __init__(self):
        super().__init__()
        self.moving = False
        self.graph, self.graphs = None, 0  # that is being recorded; how many were

    def has(self, tensor):
        return storage(tensor)._cdata in self.marked

    def mark(self, tensor):
        owned = storage(tensor)
        self.marked.setdefault(owned._cdata, StorageWeakRef(owned))  # its address is not used again
        return tensor

    def wait(self, what):
        if self.graph:
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: C901 (the rules of one dispatcher)
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        given = tensors((args, kwargs))
        there, asked = [self.has(t) for t in given], kwargs.get("device")
        if asked is not None:
            asked, kwargs["device"] = torch.device(asked).type == "cuda", CPU
            if asked and kwargs.get("generator") is not None:
                raise RuntimeError(f"{func}: Expected a 'cuda' device type for generator but found 'cpu'")
        target = any(there) if asked is None else asked
        if torch._C._current_autograd_node() is not None:  # C++ asks for the device of the gradient
            asked, target = None, any(there) or not given
        if name in WAITING and any(there):
            self.wait(name)
        if name == "_to_copy" and not self.moving:  # C++'s own conversions, as in autograd, stay on their device
            target = there[0]
        elif name in ("copy_", "_to_copy"):
            target = there[0] if name == "copy_" else target
            if target != there[-1] and not kwargs.get("non_blocking"):
                self.wait(f"{name} to the {'device' if target else 'host'}")
        elif name.startswith(("index", "_index_put")) and name not in ("index_select", "index_add", "index_copy"):
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
            if there[0] and any(not self.has(t) or t.dtype == torch.bool for t in indices):
                self.wait("index by a mask or by a CPU tensor")
            if not there[0] and any(map(self.has, indices)):
                raise RuntimeError(f"{func}: indices should be on cpu")
        elif any(there) and asked is None:
            scalars = torch.Tag.pointwise in func.tags or name.startswith(("fill", "where", "masked_fill"))
            if odd := [t for t, on in zip(given, there, strict=True) if not on and not (scalars and t.dim() == 0)]:
                raise RuntimeError(
                    f"{func}: Expected all tensors on the same device, found cuda:0 and cpu {odd[0].shape}"
                )
        out = self.graph.record(func, args, kwargs) if self.graph and target else func(*args, **kwargs)
        for tensor in tensors(out) if target else ():
            self.mark(tensor)
        return out

    @contextmanager
    def record(self, graph, stream=None, capture_error_mode="global"):
        """For torch.cuda.graph."""
        random, self.graph, self.graphs = torch.get_rng_state(), graph, self.graphs + 1
        try:
            yield
        finally:
            self.graph = None
            graph.undo()
            torch.set_rng_state(random)


class Functions(TorchFunctionMode):
    """What tensors say of their device, and what moves them, before it reaches an operation."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        gpu, kwargs, name = self.gpu, dict(kwargs or {}), getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner in (torch.Tensor.device, torch.Tensor.is_cuda, torch.Tensor.is_cpu):
            on = gpu.has(args[0])
            return {torch.Tensor.device: CUDA if on else CPU, torch.Tensor.is_cuda: on, torch.Tensor.is_cpu: not on}[
                owner
            ]
        if name in ("to", "cpu", "cuda") and owner is None:
            return self.move(name, *args, **kwargs)
        if name in ("numpy", "__array__") and gpu.has(args[0]):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if name == "tolist" and gpu.has(args[0]):
            gpu.wait("tolist")
        if func is torch.tensor and torch.device(kwargs.get("device") or CPU).type == "cuda":
            return self.move("cuda", func(*args, **kwargs | {"device": CPU}))
        out = func(*args, **kwargs)
        return gpu.mark(out) if name == "__deepcopy__" and gpu.has(args[0]) else out

    def move(self, name, tensor, *args, **kwargs):
        device = {"cpu": CPU, "cuda": CUDA}.get(name)
        for value in (*args, kwargs.pop("device", None)):
            if isinstance(value, (str, torch.device)):
                device = torch.device(value)
            elif isinstance(value, torch.dtype):
                kwargs["dtype"] = value
            elif isinstance(value, bool):
                kwargs.setdefault("non_blocking", value)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        if device is None or (device.type == "cuda") == self.gpu.has(tensor):
            return torch.Tensor.to(tensor, **kwargs) if kwargs.keys() - {"non_blocking"} else tensor
        kwargs.pop("copy", None)
        self.gpu.moving = True
        try:
            return torch.ops.aten._to_copy(tensor, device=device, **kwargs)
        finally:
            self.gpu.moving = False


@contextmanager
def pretend_gpu():
    """Gives the `PretendGpu`."""
    gpu = PretendGpu()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    replaced = {
        "device_count": lambda: 1, "is_available": lambda: True, "get_device_capability": lambda device=None: (9, 0),
        "Stream": lambda device=None: stream, "current_stream": lambda device=None: stream,
        "stream": nullcontext, "CUDAGraph": Graph, "graph": gpu.record, "_lazy_init": lambda: None,
        "get_rng_state": lambda device=None: None, "set_rng_state": lambda state, device=None: None,
    }  # fmt: skip
    general = patch.multiple(torch.accelerator, device_index=nullcontext, synchronize=lambda: None)
    with patch.multiple(torch.cuda, **replaced), general, Functions(gpu), gpu:
        yield gpu
