"""python -m experiments.pipeline.renew SCALE EXPERIMENT: new keys for renamed settings, and no new values.

It goes from what each record says it is made of, by the names in `RENAMED`, to what params.yaml asks for now. Whatever
differs otherwise is refused and stays. No images are needed: their digest is that in the dense network's record.
"""

import json
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from pandas import json_normalize

from experiments.experiment import Experiment, open_experiment
from experiments.methods import METHODS
from experiments.pipeline import ablations, work
from experiments.records import PACKED, measurements
from legr.files import digest, read_json, tensors_digest, write_json

RENAMED: dict[str, str] = {}  # settings: the old name and the new one


def main(scale: str, name: str) -> int:
    exp, refused = open_experiment(scale, name, "", "renewed", root=Path.cwd()), 0
    inputs = exp.dense["made_of"]["inputs"]
    exp.__dict__["inputs"] = {"images": inputs["images"], "dense": tensors_digest(exp.model.state_dict())}
    for path, wanted in wanted_records(exp):
        record = read_json(exp.pipelines / path, "record of a result")
        # By dotted names.
        stored, asked = (json_normalize(each).iloc[0].astype(str) for each in (renamed(record["made_of"]), wanted))
        if differing := [name for name in {*stored.index, *asked.index} if stored.get(name) != asked.get(name)]:
            refused += 1
            print(f"{path} is refused: {differing[0]} was {stored.get(differing[0])}, not {asked.get(differing[0])}")
        elif (record["key"], record["made_of"]) != (digest(wanted), wanted):
            write_json(exp.pipelines / path, record | {"key": digest(wanted), "made_of": wanted})
    for path in exp.pipelines.rglob(PACKED):
        records = [record | {"made_of": renamed(record["made_of"])} for record in measurements(path.parent)]
        write_json(path, [record | {"key": digest(record["made_of"])} for record in records])
    return refused


def wanted_records(exp: Experiment) -> Iterator[tuple[str, dict[str, Any]]]:
    """Files below the experiment's results, and what they should be made of; measurements are not among them."""
    inputs = exp.dense["made_of"]["inputs"]
    yield "dense/dense.json", work.dense_made_of(exp, inputs["images"], inputs.get("weights"))
    for method, settings in exp.settings.rankings.items():
        for trial in exp.trials(method):
            wanted = work.ranking_made_of(exp, settings, trial, METHODS[method].keep)
            yield f"rankings/{method}/record-{trial}.json", wanted
    for method in exp.methods:
        for target, trial in product(exp.settings.targets, exp.trials(method)):
            kept = exp.select(method, target, trial)
            yield f"sets/{method}/{target}-{trial}.json", work.network_made_of(exp, kept, trial)
    yield "ablations/ablations.json", ablations.ablations_made_of(exp)


def renamed(made_of: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(made_of), object_pairs_hook=lambda pairs: {RENAMED.get(k, k): v for k, v in pairs})


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]) > 0)
