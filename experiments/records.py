"""Results and their keys: what a result is named by, and how it is made once.

A result is named by what it depends on, not by the bytes of the code that made it: settings as params.yaml says them
(defaults left out), digests of its inputs, the seed, and a version number of its kind. Whoever changes what comes out
raises that number in the same commit; tests/project/test_golden.py compares committed numbers with what the code makes.
"""

import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from experiments.experiment import Experiment
from legr.files import digest, read_json, tensors_digest, write_json

# Raised by hand when what comes out changes, a changed default included: results of that kind are then made anew.
VERSIONS = {"dense": 1, "ranking": 1, "network": 1, "cuts": 1, "measurement": 1}
MEASURED, PACKED = "measured", "measurements.json"  # folder and file in a stage's folder


def made_of(exp: Experiment, kind: str, settings: dict[str, Any], inputs: dict[str, Any], seed: int = 0) -> dict:
    """All that a result depends on, in plain; its digest is the result's key.

    Device, hardware and the precision that a machine chooses are not in it: they change results by rounding only.

    Args:
        kind: a name in `VERSIONS`.
        settings: what `as_written` gives, and values of it by other names.
        inputs: digests of what the result is made from.
    """
    settings = settings | as_written(exp.settings, {"compute": {"precision"}})
    return {"kind": kind, "version": VERSIONS[kind], "settings": settings, "inputs": inputs, "seed": seed}


def as_written(settings: BaseModel, include: Any = None) -> dict[str, Any]:
    """Settings as params.yaml says them, without those that are as by default; `include` as pydantic takes it."""
    dumped = settings.model_dump(mode="json", exclude_defaults=True, include=include)
    return {name: value for name, value in dumped.items() if value != {}}


def masks_digest(kept: list[Tensor]) -> str:
    return tensors_digest({str(layer): mask for layer, mask in enumerate(kept)})


def once(exp: Experiment, name: str, made_of: dict, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The record of a result, which `make` makes unless it is there from an earlier run.

    `make` writes its files into `exp.state`, and returns their names (`files`) and what else the record says. The
    record and the files are then in `exp.out`.
    """
    key = digest(made_of)
    if record := find(exp, name, key):
        return record
    start = time.perf_counter()
    values = make()
    record = {"key": key, "made_of": made_of, "files": [], "seconds": round(time.perf_counter() - start, 1)} | values
    # How it was made is noted, and not in its key.
    made_with = exp.compute.model_dump() | {"hardware": hardware(exp), "torch": torch.__version__.split("+")[0]}
    write_json(exp.state / f"{name}.json", record | made_with)
    return find(exp, name, key)


def measure(exp: Experiment, made_of: dict, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """`once` for numbers alone: a file each while the stage runs, which `pack` puts into one."""
    return once(exp, f"{MEASURED}/{digest(made_of)}", made_of, make)


def find(exp: Experiment, name: str, key: str) -> dict[str, Any] | None:
    """The record with this key of an earlier run, now in `exp.out` with its files; None if there is none.

    It may be of another method, whose network came out the same.
    """
    others = sorted((exp.pipelines / exp.stage).parent.glob("*"))
    for folder in (exp.folder / exp.stage, exp.pipelines / exp.stage, exp.state, *others):
        record = _read(folder, name, key)
        if record.get("key") != key or not all((folder / file).exists() for file in record["files"]):
            continue
        for file in record["files"]:
            if not (exp.out / file).exists() or not (folder / file).samefile(exp.out / file):
                shutil.copy(folder / file, exp.out / file)
        if not (exp.out / f"{name}.json").exists() or read_json(exp.out / f"{name}.json", "record") != record:
            write_json(exp.out / f"{name}.json", record)
        return record
    return None


def _read(folder: Path, name: str, key: str) -> dict[str, Any]:
    if (folder / f"{name}.json").exists():
        return read_json(folder / f"{name}.json", "record of a result")
    if name.startswith(MEASURED):
        return next((record for record in measurements(folder) if record["key"] == key), {})
    return {}


def measurements(folder: Path) -> list[dict[str, Any]]:
    """The records of all measurements in a stage's folder."""
    packed = read_json(folder / PACKED, "measurements of a stage") if (folder / PACKED).exists() else []
    return packed + [read_json(path, "measurement") for path in sorted((folder / MEASURED).glob("*.json"))]


def pack(exp: Experiment, into: Path) -> None:
    """Put the stage's measurements into one file of the folder `into`."""
    write_json(into / PACKED, measurements(exp.out))
    shutil.rmtree(exp.out / MEASURED, ignore_errors=True)


def hardware(exp: Experiment) -> str:
    if exp.compute.device.startswith("cuda"):
        return torch.cuda.get_device_name(exp.compute.device)
    return f"{platform.machine()}, {os.cpu_count()} cores"
