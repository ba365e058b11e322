"""The rooms of the house: who may import whom, how long files are, and what a wheel holds."""

import ast
import re
import subprocess
import sys
import zipfile

import pytest

from tests.conftest import PROJECT, copy_project

UNIX = ["resource", "fcntl", "grp", "pwd", "termios"]  # modules that Windows has not
ROOMS = {  # of a folder or file below the project: what it must not import
    "legr": ["experiments", *UNIX],
    "experiments/__main__.py": UNIX,
    "experiments/methods.py": ["experiments.settings", "experiments.experiment", "experiments.records"],
    "experiments/settings.py": ["experiments.experiment", "experiments.records", "experiments.data"],
    "experiments/data": ["experiments.experiment", "experiments.records", "experiments.pipeline"],
    "experiments/experiment.py": ["experiments.pipeline", "experiments.analysis", "experiments.interactive"],
    "experiments/records.py": ["experiments.pipeline", "experiments.analysis", "experiments.interactive"],
    "experiments/pipeline": ["experiments.analysis", "experiments.interactive", *UNIX],
    "experiments/analysis": ["experiments.pipeline", "experiments.interactive"],
    "experiments/interactive": ["experiments.pipeline"],
}


def sources(room):
    path = PROJECT / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def imported(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("room", ROOMS)
def test_data_flows_one_way(room):
    for path in sources(room):
        for name in imported(path):
            assert not [banned for banned in ROOMS[room] if f"{name}.".startswith(f"{banned}.")], (path, name)


def test_no_file_is_too_long_to_read_at_once():
    for room in ("legr", "experiments", "benchmarks"):
        for path in sources(room):
            assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path


@pytest.mark.slow
def test_a_wheel_holds_the_library_alone(tmp_path):
    copy_project(tmp_path, "legr", "experiments", "pyproject.toml", "README.md", "LICENSE")
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", "wheels"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        facts = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"legr"}
    needed = set(re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", facts, flags=re.M))
    imports = {name.partition(".")[0] for path in sources("legr") for name in imported(path)} - {"legr", "PIL"}
    assert needed == (imports - sys.stdlib_module_names) | {"pillow"}
