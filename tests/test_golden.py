"""What the committed runs did, the code must do again: Algorithm 1, Eq. 1 and LeGR-Pruning, to the filter."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.numpy import load_file

import legr
from legr.search import Evolution, SearchSettings
from tests.conftest import NAME, PROJECT

RESULTS = PROJECT / "results" / "laptop" / NAME


@pytest.fixture(scope="module")
def dense():
    model = legr.models.load_weights(legr.models.resnet56(), RESULTS / "baseline.safetensors")
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
    return graph, legr.filter_norms(model, graph)


@pytest.mark.parametrize("suffix", ["", "-tau0"])
def test_told_the_committed_losses_the_search_asks_for_the_committed_candidates(dense, suffix):
    _, norms = dense
    maps = load_file(RESULTS / f"candidates{suffix}.safetensors")
    evolution = Evolution(norms, SearchSettings(mutated=0.11))
    for i, row in pd.read_csv(RESULTS / f"search{suffix}.csv").iterrows():
        candidate = evolution.ask()
        assert np.array_equal(candidate.scale, maps["scale"][i])
        assert np.allclose(candidate.shift, maps["shift"][i], rtol=1e-6, atol=1e-6)
        evolution.tell(candidate, row.loss, row.accuracy)
    assert evolution.done
    best = legr.Ranking.load(RESULTS / f"ranking{suffix}.json")
    assert evolution.best.scale == best.scale


def test_the_committed_networks_are_cut_again(dense):
    graph, norms = dense
    rankings = {m: legr.Ranking.load(RESULTS / f"ranking{m.removeprefix('legr')}.json") for m in ("legr", "legr-tau0")}
    rankings["norm"] = legr.Ranking.norm_only(len(norms))
    paths = sorted((RESULTS / "networks").glob("*.json"))
    assert len(paths) == 10
    for path in paths:
        (row,) = json.loads(path.read_text())
        if row["method"] == "uniform":
            kept = legr.select_uniform(graph, norms, row["target"])
        else:
            kept = legr.select(graph, rankings[row["method"]].scores(norms), row["target"])
        assert graph.flops(kept) == row["flops"]
        widths = pd.read_csv(RESULTS / "figures" / f"network-{path.stem}.csv")[row["method"]]
        assert [int(mask.sum()) for mask in kept] == widths.tolist()
