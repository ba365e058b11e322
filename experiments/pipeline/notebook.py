"""A stage as a notebook that papermill runs, and a stage's folder that is swapped in whole."""

import logging
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


def run_notebook(root: Path, stage: str, scale: str, experiment: str) -> None:
    """Run a stage's notebook by papermill; its folder is swapped in whole when the notebook has run to its end."""
    # jsonschema, which nbformat imports, would read a grammar for addresses: a second that no notebook needs.
    sys.modules["rfc3987_syntax"] = None
    import nbformat
    import papermill
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    class ThisPython(AsyncKernelManager):
        """Starts the Python of this environment, whatever kernels Jupyter finds elsewhere."""

        kernel_spec = KernelSpec(**get_kernel_dict())

    kind, _, method = stage.partition("/")
    parameters = {"scale": scale, "experiment": experiment, "results": "results"}
    os.environ |= KEEP_MEMORY | os.environ
    # Kernel and workers run the code of this folder, whatever is installed.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    warnings.filterwarnings("ignore", module="papermill|nbclient|jupyter")
    logging.getLogger("papermill").setLevel(logging.CRITICAL)
    with swapped_in(root, f"{scale}/{experiment}/{stage}") as folder:
        try:
            papermill.execute_notebook(
                root / "notebooks" / f"{NOTEBOOKS[kind]}.ipynb",
                folder / "notebook.ipynb",
                parameters | ({"method": method} if method else {}),
                cwd=root / "notebooks",
                progress_bar=False,
                kernel_name="python3",
                kernel_manager_class=ThisPython,
                shutdown_kernel="immediate",  # all is written; to end gracefully takes a second
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
        except RuntimeError as error:
            raise StageFailed(f"kernel of notebook {NOTEBOOKS[kind]} did not start, or ended: {error}") from None
        # What differs from run to run and is no result goes: progress bars, times, kernel details.
        notebook, upwards = nbformat.read(folder / "notebook.ipynb", as_version=4), "../" * (3 + len(stage.split("/")))
        notebook.metadata = {"kernelspec": notebook.metadata.kernelspec}
        for number, cell in enumerate(notebook.cells):
            cell.id = f"cell-{number}"
            cell.metadata = {"tags": cell.metadata.tags} if cell.metadata.get("tags") else {}
            if cell.cell_type == "code":
                cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            else:  # links lead to the same files from the stage's folder
                cell.source = cell.source.replace("](../", f"]({upwards}")
        nbformat.write(notebook, folder / "notebook.ipynb")


@contextmanager
def swapped_in(root: Path, relative: str) -> Iterator[Path]:
    """An empty folder to write to, which takes the place of results/`relative` when the block ends without an error.

    What an interrupted stage resumes from lies beside it, and goes when the stage has ended.
    """
    state, final = root / ".state/results" / relative, root / "results" / relative
    shutil.rmtree(state / "unfinished", ignore_errors=True)
    (state / "unfinished").mkdir(parents=True)
    try:
        yield state / "unfinished"
    except BaseException:
        shutil.rmtree(state / "unfinished")
        with suppress(OSError):
            os.removedirs(state)  # and folders above it, where nothing else is in them
        raise
    final.parent.mkdir(parents=True, exist_ok=True)
    if final.exists():
        final.rename(state / "before")
    (state / "unfinished").rename(final)
    shutil.rmtree(state, ignore_errors=True)
