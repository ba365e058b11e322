"""Where things lie. Nothing here imports PyTorch, so that the runner starts fast."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import legr
from legr.errors import UserError


def code_digest() -> str:
    """Names the state of interrupted work by the library's code: other code must not go on with it."""
    files = sorted(Path(legr.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


@dataclass(frozen=True)
class Places:
    """The place of everything that one experiment at one scale reads and writes."""

    scale: str
    name: str
    root: Path
    results_root: Path

    @property
    def results(self) -> Path:
        return self.results_root / self.scale / self.name

    @property
    def figures(self) -> Path:
        return self.results / "figures"

    @property
    def baseline(self) -> Path:
        """The dense network's weights; small enough for git, so that a clone has what all else starts from."""
        return self.results / "baseline.safetensors"

    @property
    def checkpoints(self) -> Path:
        """Beside results/ as checkpoints/; within any other results folder."""
        base = self.root if self.results_root == self.root / "results" else self.results_root
        return base / "checkpoints" / self.scale / self.name

    @property
    def images(self) -> Path:
        return self.root / "data" / self.scale / f"{self.name}.safetensors"

    @property
    def downloads(self) -> Path:
        return self.root / "data" / "downloads"

    @property
    def state(self) -> Path:
        """Where interrupted work resumes from; the pipeline gives each stage its own and clears it at the end."""
        return Path(os.environ.get("LEGR_STATE") or self.root / ".state" / "by-hand" / code_digest())

    def stage_state(self, stage: str) -> Path:
        """What an interrupted stage resumes from. DVC deletes outputs before a stage runs, so it lies elsewhere."""
        return self.root / ".state" / self.scale / self.name / stage / code_digest()

    def ranking(self, method: str) -> Path:
        return self.results / f"ranking{method.removeprefix('legr')}.json"

    def search(self, method: str) -> Path:
        return self.results / f"search{method.removeprefix('legr')}.csv"

    def candidates(self, method: str) -> Path:
        """Every (α, κ) that the search tried: tensors scale and shift [evaluations, layers]."""
        return self.results / f"candidates{method.removeprefix('legr')}.safetensors"

    def network(self, method: str, target: float) -> Path:
        """The rows about one pruned network, one per seed."""
        return self.results / "networks" / f"{method}-{target}.json"

    def weights(self, method: str, target: float, seed: int) -> Path:
        return self.checkpoints / f"{method}-{target}" / f"seed{seed}.safetensors"


def read_params(
    scale: str, experiment: str, results: str | None = None
) -> tuple[dict[str, Any], dict[str, Any], Places]:
    """params.yaml, found here or in a folder above: the experiment's section at this scale, and its plan.

    Raises:
        UserError: if the file can't be read, or has no such scale or experiment.
    """
    here = Path.cwd()
    root = next((p for p in (here, *here.parents) if (p / "params.yaml").is_file()), None)
    if root is None:
        raise UserError(f"params.yaml was not found in {here} or a folder above it; run from inside the project")
    try:
        params = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
        plans = params.pop("experiments")
        params.pop("scale", None)
    except (yaml.YAMLError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"params.yaml can't be read: {' '.join(str(error).split())}") from None
    if scale not in params:
        raise UserError(f"scale is {scale!r}; it must be one of {', '.join(params)}")
    if experiment not in params[scale]:
        raise UserError(f"experiment is {experiment!r}; scale {scale} has {', '.join(params[scale])}")
    places = Places(scale, experiment, root, root / (results or "results"))
    return params[scale][experiment], plans.get(experiment, {}), places
