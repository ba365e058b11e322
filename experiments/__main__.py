"""python -m experiments STAGE --scale demo --experiment cifar10-resnet56 [--set name=value ...]"""

import argparse
import json
import logging
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

import nbformat

from experiments.places import Places, read_params
from legr.errors import UserError
from legr.files import write_text

NOTEBOOKS = Path("notebooks")

# glibc hands large blocks back to the system at once, and a network takes the same ones in every step.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**34)}


def main() -> int:
    stages = ["data", *sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")), "report"]
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("stage", choices=stages)
    parser.add_argument("--scale", required=True)
    parser.add_argument("--experiment", required=True, nargs="+", help="one or several; a report is of all")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of the notebook")
    arguments = parser.parse_args()
    try:
        parameters = dict(_pair(text) for text in arguments.set)
        elsewhere = parameters.get("results")
        places = [read_params(arguments.scale, experiment, elsewhere)[2] for experiment in arguments.experiment]
        if arguments.stage in ("data", "report"):
            from experiments import datasets, report
            from experiments.config import workspace

            spaces = [workspace(arguments.scale, experiment) for experiment in arguments.experiment]
            if arguments.stage == "report":
                report.build(spaces, spaces[0].results.parent / "report.html")
            else:
                for space in spaces:
                    datasets.prepare(space.settings.data, space.downloads, space.images)
        else:
            for place in places:
                execute(arguments.stage, place, parameters)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.stage}: peak memory {_peak_memory() / 2**20:,.0f} MiB", file=sys.stderr)
    return 0


def _peak_memory() -> int:
    """Bytes, of the largest process that this stage needed: its own, or its notebook's kernel."""
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(peaks) * (1 if sys.platform == "darwin" else 1024)


def execute(name: str, space: Places, parameters: dict[str, str]) -> None:
    """Run a notebook with papermill; its executed copy appears only when it ran to the end."""
    import papermill
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import Unicode

    warnings.filterwarnings("ignore", module="papermill|nbclient|jupyter")
    logging.getLogger("papermill").setLevel(logging.ERROR)
    known = papermill.inspect_notebook(NOTEBOOKS / f"{name}.ipynb")
    if wrong := [k for k in parameters if k not in known]:
        raise UserError(f"--set names {wrong[0]!r}; notebook {name} has the parameters {', '.join(known)}")
    values = {"scale": space.scale, "experiment": space.name} | {k: _value(v) for k, v in parameters.items()}
    suffix = "".join(f"-{v}" for k, v in parameters.items() if k not in ("results", "overrides"))
    state = space.stage_state(name + suffix)
    os.environ["LEGR_STATE"] = str(state)
    os.environ |= KEEP_MEMORY | os.environ
    with tempfile.TemporaryDirectory() as folder, _progress(Path(folder) / "progress"):
        output = Path(folder) / "executed.ipynb"

        class LocalKernelManager(AsyncKernelManager):
            """Speaks to the kernel through files of this user, not through open ports."""

            transport = Unicode("ipc")
            ip = Unicode(f"{folder}/kernel")

        try:
            papermill.execute_notebook(
                NOTEBOOKS / f"{name}.ipynb",
                output,
                values,
                cwd=NOTEBOOKS,
                progress_bar=False,
                kernel_name="python3",
                kernel_manager_class=LocalKernelManager,
            )
        except papermill.PapermillExecutionError as error:
            if error.ename == "UserError":
                raise UserError(error.evalue) from None
            print("\n".join(error.traceback), file=sys.stderr)
            raise UserError(
                f"notebook {name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}"
            ) from None
        notebook = nbformat.read(output, as_version=4)
    _clean(notebook)
    write_text(space.results / "notebooks" / f"{name}{suffix}.ipynb", nbformat.writes(notebook) + "\n")
    if not os.environ.get("LEGR_KEEP_STATE"):
        shutil.rmtree(state.parent, ignore_errors=True)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"--set is {text!r}; it must be NAME=VALUE")
    return name, value


def _value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def _clean(notebook: nbformat.NotebookNode) -> None:
    """Drop what differs from run to run without being a result: paths, times, kernel details."""
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec",) if k in notebook.metadata}
    for number, cell in enumerate(notebook.cells):
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        cell.id = f"cell-{number}"


class _progress:
    """Shows on this terminal what the notebook's kernel writes to its progress file."""

    def __init__(self, path: Path):
        self.path = path
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self):
        self.path.touch()
        os.environ["LEGR_PROGRESS"] = str(self.path)
        self.thread.start()

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        del os.environ["LEGR_PROGRESS"]

    def _follow(self):
        shown = ""
        with self.path.open(encoding="utf-8") as file:
            while True:
                last = self.stop.is_set()
                if text := file.read():
                    sys.stderr.write(text)
                    sys.stderr.flush()
                    shown = text
                if last:
                    if shown and not shown.endswith("\n"):  # a bar cut short: what follows gets a line of its own
                        sys.stderr.write("\n")
                    return
                time.sleep(0.5)


if __name__ == "__main__":
    sys.exit(main())
