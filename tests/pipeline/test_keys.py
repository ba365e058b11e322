"""The committed records are those that params.yaml asks for: no network and no search would be made again."""

from itertools import product

import pytest

from experiments.experiment import open_experiment
from experiments.methods import METHODS
from experiments.pipeline import ablations, work
from legr.files import digest, read_json, tensors_digest
from tests.conftest import NAME, PHOTOS, PROJECT


def wanted_records(exp, inputs):
    """Files below the experiment's results, and what they should be made of."""
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


@pytest.mark.parametrize("name", [NAME, PHOTOS])
def test_the_committed_records_have_the_keys_that_params_asks_for(name):
    exp = open_experiment("laptop", name, "", "playground", root=PROJECT)
    inputs = exp.dense["made_of"]["inputs"]  # of the images only their digest is at hand
    exp.__dict__["inputs"] = {"images": inputs["images"], "dense": tensors_digest(exp.model.state_dict())}
    for path, wanted in wanted_records(exp, inputs):
        record = read_json(exp.pipelines / path, "record of a result")
        assert (record["made_of"], record["key"]) == (wanted, digest(wanted)), path
