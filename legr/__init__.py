"""LeGR: efficient model compression via learned global ranking (Chin et al., CVPR 2020)."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Graph": "graph",
    "Ranking": "ranking",
    "UserError": "errors",
    "filter_norms": "ranking",
    "learn_ranking": "search",
    "prune": "surgery",
    "select": "ranking",
    "select_uniform": "ranking",
    "trace": "graph",
}
__all__ = [*_HOMES, "models"]


def __getattr__(name: str) -> Any:
    """PyTorch takes seconds to import: parts are loaded when they are first asked for."""
    if name == "models":
        return import_module("legr.models")
    if name in _HOMES:
        return getattr(import_module(f"legr.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'legr' has no attribute {name!r}")
