"""python -m experiments STAGE SCALE EXPERIMENT: run one stage, as dvc.yaml does.

STAGE is data, dense, rankings/METHOD, sets/METHOD, ablations, compare, explore, or report (which takes all
experiments of a scale). `network METHOD TARGET TRIAL` after scale and experiment trains one network of a set, under
torchrun on several GPUs; the stage then finds it.
"""

import argparse
import logging
import os
import resource
import shutil
import sys
import warnings
from pathlib import Path

import nbformat

from experiments.environment import KEEP_MEMORY

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
    kind, _, method = arguments.stage.partition("/")
    root = Path.cwd()
    try:
        if not (root / "params.yaml").is_file():
            raise StageFailed(f"params.yaml was not found in {root}; run from the project's folder")
        if kind in NOTEBOOKS:
            run_notebook(root, arguments.stage, arguments.scale, arguments.experiment[0], method)
        elif kind == "data":
            from experiments import config, datasets

            name = arguments.experiment[0]
            settings, _ = config.read_settings(root, arguments.scale, name)
            datasets.prepare(
                settings.data, root / "data/downloads", root / f"data/{arguments.scale}/{name}.safetensors"
            )
        elif kind == "report":
            from experiments import report

            report.build(root / "results" / arguments.scale, arguments.experiment)
        elif kind == "network":
            if len(arguments.experiment) != 4:
                parser.error("network needs an experiment, a method, a target and a trial")
            train_under_torchrun(arguments.scale, *arguments.experiment)
        else:
            parser.error(
                f"stage is {arguments.stage!r}; it must be one of {', '.join(NOTEBOOKS)}, data, report, network"
            )
    except ValueError as error:
        if type(error).__name__ not in ("StageFailed", "UserError"):  # legr is not imported here: it takes seconds
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    print(f"{arguments.stage}: peak memory {peak * (1 if sys.platform == 'darwin' else 1024) / 2**20:,.0f} MiB")
    return 0


def run_notebook(root: Path, stage: str, scale: str, experiment: str, method: str) -> None:
    """Run a stage's notebook by papermill; its folder is swapped in whole when the notebook has run to its end."""
    import papermill

    name = NOTEBOOKS[stage.partition("/")[0]]
    state = root / ".state" / "results" / scale / experiment / stage
    part, final = state / "part", root / "results" / scale / experiment / stage
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    parameters = {"scale": scale, "experiment": experiment, "results": "results"} | (
        {"method": method} if method else {}
    )
    os.environ |= KEEP_MEMORY | os.environ
    warnings.filterwarnings("ignore", module="papermill|nbclient|jupyter")
    logging.getLogger("papermill").setLevel(logging.ERROR)
    try:
        papermill.execute_notebook(
            root / "notebooks" / f"{name}.ipynb",
            part / "notebook.ipynb",
            parameters,
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
        raise StageFailed(f"notebook {name} failed in cell {error.exec_count}: {error.ename}: {error.evalue}") from None
    notebook = nbformat.read(part / "notebook.ipynb", as_version=4)
    nbformat.write(cleaned(notebook), part / "notebook.ipynb")
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(state / "before")
    part.rename(final)
    shutil.rmtree(state, ignore_errors=True)


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Without what differs from run to run and is no result: progress bars, times, kernel details."""
    notebook.metadata = {k: notebook.metadata[k] for k in ("kernelspec",) if k in notebook.metadata}
    for number, cell in enumerate(notebook.cells):
        cell.metadata = {"tags": cell.metadata["tags"]} if cell.metadata.get("tags") else {}
        cell.id = f"cell-{number}"
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def train_under_torchrun(scale: str, experiment: str, method: str, target: str, trial: str) -> None:
    """torchrun --nproc-per-node 4 -m experiments network paper imagenet-mobilenetv2 legr 0.5 0"""
    import torch

    from experiments import work
    from experiments.config import open_experiment

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        exp = open_experiment(scale, experiment, f"sets/{method}", "results")
        work.train_network(exp, method, float(target), int(trial))
    finally:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
