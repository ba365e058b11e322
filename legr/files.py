"""Writing files so that a reader finds the old one or the whole new one, never a half."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from legr.errors import UserError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`; moved onto it when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2) + "\n")


def digest(value: Any) -> str:
    """Short SHA-256 of a JSON-able value: the name of the state that depends on just that value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Short SHA-256 of named tensors, their values and types."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings and containers of them, to be resumed from."""
    with atomic(path) as temporary:
        torch.save(state, temporary)


def load_state(path: str | Path) -> dict[str, Any] | None:
    """What `save_state` wrote, or None if there is nothing; never runs pickled code."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        return None
    except Exception as error:
        raise UserError(
            f"checkpoint {path} is corrupt ({type(error).__name__}); delete it to start this step again"
        ) from None
