"""What the committed runs did, the code must do again: Algorithm 1, Eq. 1 and LeGR-Pruning, to the filter."""

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

import legr
from experiments import samples
from experiments.config import open_experiment
from experiments.tables import all_networks, network
from legr.search import Evolution
from legr.training import evaluate
from tests.conftest import NAME, PROJECT


@pytest.fixture(scope="module", params=[NAME])
def exp(request):
    return open_experiment("laptop", request.param, "compare", "results", root=PROJECT)


@pytest.mark.parametrize("method", ["legr", "legr-ours"])
def test_told_the_committed_losses_the_search_asks_for_the_committed_candidates(exp, method):
    settings = exp.settings.rankings[method]
    start = legr.Ranking.norm_only(len(exp.norms)) if settings.start == "norm" else None
    for trial in range(exp.settings.trials):
        maps = load_file(exp.path(f"rankings/{method}/candidates-{trial}.safetensors"))
        evolution = Evolution(exp.norms, settings.search.model_copy(update={"seed": trial}), start)
        for i, row in pd.read_csv(exp.path(f"rankings/{method}/search-{trial}.csv")).iterrows():
            candidate = evolution.ask()
            assert np.allclose(candidate.scale, maps["scale"][i], rtol=1e-12, atol=0)  # exp rounds by processor
            assert np.allclose(candidate.shift, maps["shift"][i], rtol=1e-6, atol=1e-6)
            evolution.tell(candidate, row.loss, row.accuracy)
        assert evolution.done
        assert np.allclose(evolution.best.scale, exp.ranking(method, trial).scale, rtol=1e-12, atol=0)


def test_the_committed_dense_network_and_rankings_make_the_committed_networks(exp):
    table = all_networks(exp)
    assert len(table) == len(exp.methods) * len(exp.settings.targets) * exp.settings.trials
    for row in table.itertuples():
        kept = exp.select(row.method, row.target, row.trial)
        assert (exp.graph.flops(kept), exp.graph.params(kept)) == (row.flops, row.params), (row.method, row.target)


def test_the_published_networks_are_as_accurate_as_the_table_says(exp):
    """On the 500 images that lie in the repository: within three standard deviations."""
    table, images = all_networks(exp), samples.read(open_experiment("laptop", exp.name, "explore", root=PROJECT)).test
    for target in (max(exp.settings.targets), min(exp.settings.targets)):
        for row in table[(table.target == target) & (table.trial == 0)].itertuples():
            found = evaluate(network(exp, row.method, target), images, exp.compute)["accuracy"]
            allowed = 3 * (row.accuracy * (1 - row.accuracy) / len(images)) ** 0.5
            assert abs(found - row.accuracy) < allowed, (row.method, target)
