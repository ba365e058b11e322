"""Files and mistakes: whole files or none, names for what a result depends on, settings, and the users' exception."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError


class UserError(ValueError):
    """A mistake in what a user hands in: one sentence with the parameter or file, its value and what is allowed."""


class Settings(BaseModel):
    """Values that a user sets: checked, not changed afterwards, and refused where the name is unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


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
