"""python -m experiments STAGE SCALE EXPERIMENT: run one stage, as dvc.yaml does.

STAGE is data, dense, rankings/METHOD, sets/METHOD, ablations, compare, explore, or report (which takes all
experiments of a scale).
"""

import argparse
import logging
import os
import resource
import shutil
import sys
import warnings
from pathlib import Path

from experiments import KEEP_MEMORY

NOTEBOOKS = {
    "dense": "1_dense",
    "rankings": "2_ranking",
    "sets": "3_prune",
    "ablations": "4_ablations",
    "compare": "5_compare",
    "explore": "explore",
}


class StageFailed(ValueError):
    """Says why, in one sentence."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("scale")
    parser.add_argument("experiment", nargs="+")
    arguments = parser.parse_args()
    stage, scale, name, root = arguments.stage, arguments.scale, arguments.experiment[0], Path.cwd()
    # What a stage needs is imported for it alone: it takes seconds.
    try:
        if not (root / "params.yaml").is_file():
            raise StageFailed(f"params.yaml was not found in {root}; run from the project's folder")
        kind, _, method = stage.partition("/")
        if bool(method) != (kind in ("rankings", "sets")):
            raise StageFailed(f"stage is {stage!r}; rankings and sets, and only they, have a method: sets/legr")
        if kind in NOTEBOOKS:
            run_notebook(root, stage, scale, name)
        elif stage == "data":
            from experiments import config, datasets

            settings, _ = config.read_settings(root, scale, name)
            datasets.prepare(settings.data, root / "data/downloads", root / f"data/{scale}/{name}.pt")
        elif stage == "report":
            from experiments import config, report

            opened = [
                config.open_experiment(scale, each, "report", "results", root=root) for each in arguments.experiment
            ]
            state, final = root / ".state" / "results" / scale / "report", root / "results" / scale / "report"
            try:
                report.build(opened, state / "part")
                swap(state, final)
            finally:
                shutil.rmtree(state, ignore_errors=True)
        else:
            parser.error(f"stage is {stage!r}; it must be one of {', '.join(NOTEBOOKS)}, data, report")
    except ValueError as error:
        if type(error).__name__ not in ("StageFailed", "UserError"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{stage}: peak memory {peak * (1 if sys.platform == 'darwin' else 1024) / 2**20:,.0f} MiB")
    return 0


def run_notebook(root: Path, stage: str, scale: str, experiment: str) -> None:
    """Run a stage's notebook by papermill; its folder is swapped in whole when the notebook has run to its end."""
    # jsonschema, which nbformat imports, would read a grammar for addresses: a second that no notebook needs.
    sys.modules["rfc3987_syntax"] = None
    import nbformat
    import papermill

    kind, _, method = stage.partition("/")
    state = root / ".state" / "results" / scale / experiment / stage
    part = fresh(state / "part")
    parameters = {"scale": scale, "experiment": experiment, "results": "results"}
    os.environ |= KEEP_MEMORY | os.environ
    # Kernel and workers run the code of this folder, whatever is installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    warnings.filterwarnings("ignore", module="papermill|nbclient|jupyter")
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        papermill.execute_notebook(
            root / "notebooks" / f"{NOTEBOOKS[kind]}.ipynb",
            part / "notebook.ipynb",
            parameters | ({"method": method} if method else {}),
            cwd=root / "notebooks",
            progress_bar=False,
            kernel_name="python3",
            stderr_file=sys.stderr,
            extra_arguments=["--IPKernelApp.log_level=ERROR"],
        )
    except papermill.PapermillExecutionError as error:
        print(file=sys.stderr)  # a progress bar may stand in the line
        if error.ename == "UserError":
            raise StageFailed(error.evalue) from None
        print("\n".join(error.traceback), file=sys.stderr)
        what = f"{error.ename}: {error.evalue}"
        raise StageFailed(f"notebook {NOTEBOOKS[kind]} failed in cell {error.exec_count}: {what}") from None
    # What differs from run to run and is no result goes: progress bars, times, kernel details.
    notebook = nbformat.read(part / "notebook.ipynb", as_version=4)
    notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, part / "notebook.ipynb")
    swap(state, root / "results" / scale / experiment / stage)


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def swap(state: Path, final: Path) -> None:
    """Put what a stage has made, `state`/part, in the place of `final`; the state is not needed any more."""
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(state / "before")
    (state / "part").rename(final)
    shutil.rmtree(state, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
