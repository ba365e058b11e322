"""python -m experiments STAGE SCALE EXPERIMENT: run one stage, as dvc.yaml does.

STAGE is data, dense, rankings/METHOD, sets/METHOD, ablations, compare, explore, or report (which takes all
experiments of a scale).
"""

import argparse
import sys
from pathlib import Path

from experiments.pipeline.notebook import NOTEBOOKS, StageFailed, run_notebook, swapped_in


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("stage")
    parser.add_argument("scale")
    parser.add_argument("experiment", nargs="+")
    arguments = parser.parse_args()
    stage, scale, name, root = arguments.stage, arguments.scale, arguments.experiment[0], Path.cwd()
    # What a stage needs is imported for it alone: it takes seconds.
    try:
        if sys.platform == "win32":
            raise StageFailed("the pipeline runs on Linux and macOS; on Windows it needs WSL, start it there")
        if not (root / "params.yaml").is_file():
            raise StageFailed(f"params.yaml was not found in {root}; run from the project's folder")
        kind, _, method = stage.partition("/")
        if bool(method) != (kind in ("rankings", "sets")):
            raise StageFailed(f"stage is {stage!r}; rankings and sets, and only they, have a method: sets/legr")
        if kind in NOTEBOOKS:
            run_notebook(root, stage, scale, name)
        elif stage == "data":
            from experiments.data import datasets
            from experiments.settings import read_settings

            settings, _ = read_settings(root, scale, name)
            datasets.prepare(settings.data, root / "data/downloads", root / f"data/{scale}/{name}.pt")
        elif stage == "report":
            from experiments.analysis import report
            from experiments.experiment import open_experiment

            opened = [open_experiment(scale, each, "report", "results", root=root) for each in arguments.experiment]
            with swapped_in(root, f"{scale}/report") as part:
                report.build(opened, part)
        else:
            parser.error(f"stage is {stage!r}; it must be one of {', '.join(NOTEBOOKS)}, data, report")
    except ValueError as error:
        if type(error).__name__ not in ("StageFailed", "UserError"):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
