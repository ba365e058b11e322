"""What the committed runs did, the code must do again: Algorithm 1, Eq. 1 and LeGR-Pruning, to the filter."""

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

import legr
from experiments.config import open_experiment
from legr.search import Evolution, SearchSettings
from tests.conftest import NAME, PROJECT

RESULTS = PROJECT / "results" / "laptop" / NAME
SIX_OF_55 = 0.11  # the share of mutated layers in the committed searches; since then int(0.1 · 55) = 5


@pytest.fixture(scope="module")
def exp():
    return open_experiment("laptop", NAME, "compare", root=PROJECT)


@pytest.mark.parametrize("method", ["legr", "legr-ours"])
def test_told_the_committed_losses_the_search_asks_for_the_committed_candidates(exp, method):
    folder = RESULTS / "rankings" / method
    maps = load_file(folder / "candidates-0.safetensors")
    evolution = Evolution(exp.norms, SearchSettings(mutated=SIX_OF_55))
    for i, row in pd.read_csv(folder / "search-0.csv").iterrows():
        candidate = evolution.ask()
        assert np.array_equal(candidate.scale, maps["scale"][i])
        assert np.allclose(candidate.shift, maps["shift"][i], rtol=1e-6, atol=1e-6)
        evolution.tell(candidate, row.loss, row.accuracy)
    assert evolution.done
    assert evolution.best.scale == legr.Ranking.load(folder / "ranking-0.json").scale


def test_the_committed_dense_network_and_rankings_make_the_committed_networks(exp):
    table = pd.read_csv(RESULTS / "compare/tradeoff.csv").drop_duplicates(["method", "target"])
    assert len(table) == len(list(RESULTS.glob("sets/*/*.json"))) == 10
    for row in table.itertuples():
        kept, path = exp.select(row.method, row.target), RESULTS / "sets" / row.method / f"{row.target}.json"
        assert (exp.graph.flops(kept), exp.graph.params(kept)) == (row.flops, row.params), (row.method, row.target)
        assert json.loads(path.read_text())[0]["flops"] == row.flops
        widths = pd.read_csv(path.with_name(f"{row.target}-widths.csv")).iloc[:, 3]
        assert [int(mask.sum()) for mask in kept] == widths.tolist()
