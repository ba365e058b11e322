"""Files and mistakes: whole files or none, names for what a result depends on, settings, and the users' exception."""

import hashlib
import inspect
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import fx, nn


class UserError(ValueError):
    """A mistake in what a user hands in: one sentence with the parameter or file, its value and what is allowed."""


class Settings(BaseModel):
    """Values that a user sets: checked, not changed afterwards, and refused where the name is unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def tensor_of(value: Any, name: str) -> torch.Tensor:
    """A tensor of numbers out of a tensor, a NumPy array or a list; `name` is for the UserError about what is none."""
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.from_numpy(np.array(value))
        if not tensor.is_complex():
            return tensor.detach()
    except (TypeError, ValueError, RuntimeError):
        pass
    raise UserError(f"{name} is of type {type(value).__name__}; it must be a tensor or array of real numbers")


def number_of(value: Any) -> float:
    """A number out of Python's, NumPy's or a tensor of one; NaN out of anything else."""
    one = isinstance(value, torch.Tensor | np.ndarray) and value.ndim == 0
    value = value.item() if one else value
    return float(value) if isinstance(value, Real) else math.nan


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends without an error.

    Raises:
        UserError: the disk is full or the folder can't be written to; `path` is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error).removeprefix("Error while serializing: ")
        raise UserError(f"file {path} can't be written ({reason}); make room or choose another folder") from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def read_json(path: str | Path, what: str) -> Any:
    """The JSON value in `path`; errors say that it holds the `what`."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; it holds the {what}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a JSON file ({error}); it should hold the {what}") from None


def digest(value: Any) -> str:
    """Short SHA-256 of a JSON-able value: names the state or result that depends on just that value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Short SHA-256 of named tensors: their values, shapes and types."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def code_digest(*folders: Path) -> str:
    """Short SHA-256 of all Python files in `folders`; without folders, of this library's."""
    folders = folders or (Path(__file__).parent,)
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in paths)).hexdigest()[:16]


def computation(model: nn.Module) -> list[str]:
    """What a network computes beyond its weights, as text that is the same in every process.

    That is the traced code of a torch.fx.GraphModule, the attributes of all modules (training modes are among them),
    the source of classes that are not PyTorch's, and the names of the parameters that are trained.
    """
    modules = list(model.named_modules())
    kinds = {kind for _, module in modules for kind in type(module).__mro__}
    kinds = {kind for kind in kinds if kind.__module__.split(".")[0] not in ("torch", "builtins")}
    text = [module.code for _, module in modules if isinstance(module, fx.GraphModule)]
    of_every_module = vars(nn.Module()).keys() - {"training"}
    for path, module in modules:
        attributes = sorted((name, repr(value)) for name, value in vars(module).items() if name not in of_every_module)
        text.append(f"{path} {type(module).__qualname__} {attributes}")
    text += sorted(map(source, kinds))
    text += [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [re.sub(" at 0x[0-9a-f]+", "", part) for part in text]


def source(kind: type) -> str:
    """The source of a class; where Python has none, as of a class typed at a prompt, the bytecode of its methods."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        codes = {name: method.__code__ for name, method in vars(kind).items() if inspect.isfunction(method)}
        return repr([(name, code.co_code, code.co_names, code.co_consts) for name, code in sorted(codes.items())])


def state_path(folder: str | Path, kind: str, given: list[Any], computed_by: list[Any], suffix: str) -> Path:
    """The file for the state of interrupted work, which is named by everything that the work depends on.

    Where the folder has state of the same work by other code or another network, one line on stderr says that it is
    not continued.

    Args:
        given: settings and digests of inputs.
        computed_by: the code and the network, see `code_digest` and `computation`.
    """
    name, folder = f"{kind}-{digest(given)}", Path(folder)
    path = folder / f"{name}-{digest(computed_by)}{suffix}"
    if not path.exists() and any(folder.glob(f"{name}-*{suffix}")):
        print(f"{folder}: a {kind} begun by other code or with another network starts anew", file=sys.stderr)
    return path


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings and containers of them, from which interrupted work resumes."""
    buffer = io.BytesIO()  # torch.save to a full disk raises an error that does not say so
    torch.save(state, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load_state(path: str | Path) -> dict[str, Any] | None:
    """What `save_state` wrote, or None if there is nothing; never runs pickled code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True) if Path(path).exists() else None
    except Exception as error:
        raise UserError(f"file {path} is corrupt ({type(error).__name__}); delete it to have it made anew") from None
