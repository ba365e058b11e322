"""Tensors on disk that interrupted work resumes from, and the names that tell one such state from another."""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from legr.errors import UserError
from legr.files import atomic


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Short SHA-256 of named tensors, their values and types."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode() + flat.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def save_state(path: str | Path, state: dict[str, Any]) -> None:
    """Tensors, numbers, strings and containers of them, to be resumed from."""
    buffer = io.BytesIO()  # written by PyTorch itself, a full disk would give an error that does not say so
    torch.save(state, buffer)
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


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
