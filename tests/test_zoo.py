"""Networks that nobody here wrote: torchvision's classifiers, pruned to half of their FLOPs."""

import pytest

from benchmarks.networks import NETWORKS, PAGE, cells, try_legr
from tests.conftest import PROJECT


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_torchvisions_networks_are_pruned_right_or_refused_by_name(name):
    outcome = try_legr(name)  # it fails where a parameter of the pruned network gets no gradient
    page = (PROJECT / PAGE).read_text(encoding="utf-8")
    assert f"| {name} | {' | '.join(cells(outcome))} |" in page
    if not outcome.refusal:
        assert outcome.flops_ratio < 0.5
        assert outcome.difference < 1e-5
