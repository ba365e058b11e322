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
SIX_OF_55 = 0.11  # the share of mutated layers in the committed searches; since then int(0.1 · 55) = 5


@pytest.fixture(scope="module")
def dense():
    model = legr.models.load_weights(legr.models.resnet56(), RESULTS / "dense" / "network.safetensors")
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
    return graph, legr.filter_norms(model, graph)


@pytest.mark.parametrize("method", ["legr", "legr-ours"])
def test_told_the_committed_losses_the_search_asks_for_the_committed_candidates(dense, method):
    _, norms = dense
    folder = RESULTS / "rankings" / method
    maps = load_file(folder / "candidates-0.safetensors")
    evolution = Evolution(norms, SearchSettings(mutated=SIX_OF_55))
    for i, row in pd.read_csv(folder / "search-0.csv").iterrows():
        candidate = evolution.ask()
        assert np.array_equal(candidate.scale, maps["scale"][i])
        assert np.allclose(candidate.shift, maps["shift"][i], rtol=1e-6, atol=1e-6)
        evolution.tell(candidate, row.loss, row.accuracy)
    assert evolution.done
    assert evolution.best.scale == legr.Ranking.load(folder / "ranking-0.json").scale


def test_the_committed_networks_are_cut_again(dense):
    graph, norms = dense
    rankings = {m: legr.Ranking.load(RESULTS / "rankings" / m / "ranking-0.json") for m in ("legr", "legr-ours")}
    rankings["norm"] = legr.Ranking.norm_only(len(norms))
    paths = sorted(path for path in (RESULTS / "sets").glob("*/*.json"))
    assert len(paths) == 10
    for path in paths:
        (row,) = json.loads(path.read_text())
        if row["method"] == "uniform":
            kept = legr.select_uniform(graph, norms, row["target"])
        else:
            kept = legr.select(graph, rankings[row["method"]].scores(norms), row["target"])
        assert graph.flops(kept) == row["flops"]
        widths = pd.read_csv(path.with_name(f"{path.stem}-widths.csv")).iloc[:, 3]
        assert [int(mask.sum()) for mask in kept] == widths.tolist()
