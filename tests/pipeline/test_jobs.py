"""Jobs: here, side by side in processes, and on a Dask cluster; the results are the same."""

import json

import distributed
import pandas as pd
import pytest
import torch

import legr
from experiments import experiment
from experiments.experiment import open_experiment
from experiments.pipeline import jobs, work
from tests.conftest import NAME
from tests.pipeline.test_work import plant

EACH = [("norm", target, trial) for target in (0.6, 0.5) for trial in (0, 1)]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """One thread, as workers have it: results are then the same to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield plant(tmp_path_factory.mktemp("project"))
    torch.set_num_threads(before)


def opened(project, results, stage="sets/norm", **overrides):
    search = {"rankings.legr.search": {"population": 3, "evaluations": 8, "sample": 2}}
    return open_experiment("demo", NAME, stage, results, search | overrides, project)


def timeless(records):
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.fixture(scope="module")
def here(project):
    return timeless(jobs.run(opened(project, "here"), work.train_network, EACH, "networks"))


def seen(exp, *arguments):
    return exp.stage, *arguments


def decoded(exp):
    """By a process of the worker's own, as streamed images are."""
    return [int(number) for number in torch.utils.data.DataLoader([3, 5], num_workers=1)]


@pytest.mark.slow
def test_two_workers_here_give_the_same_networks_and_the_same_search(project, here):
    exp, ranking = opened(project, "two", workers=2), opened(project, "two", "rankings/legr", workers=2)
    assert timeless(jobs.run(exp, work.train_network, EACH, "networks")) == here
    assert jobs.run(exp, decoded, [()], "decoded") == [[3, 5]]
    with pytest.raises(legr.UserError, match=r"^target is 0\.0001; the lowest reachable fraction[^\n]*$"):
        jobs.run(exp, work.train_network, [("norm", 0.0001, 0)], "a network too small")
    jobs.run(ranking, work.learn, [("legr", 0), ("legr", 1)], "trials")
    alone = opened(project, "here", "rankings/legr")
    work.learn(alone, "legr", 0)
    assert alone.ranking("legr", 0) == ranking.ranking("legr", 0)
    assert pd.read_csv(alone.out / "search-0.csv").equals(pd.read_csv(ranking.out / "search-0.csv"))
    assert (exp.out / "0.5-0.safetensors").read_bytes() == (alone.folder / "sets/norm/0.5-0.safetensors").read_bytes()


@pytest.mark.slow
def test_workers_of_a_cluster_give_the_same_networks(project, here):
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        exp = opened(project, "elsewhere", workers=cluster.scheduler_address)
        assert timeless(jobs.run(exp, work.train_network, EACH, "networks")) == here


def test_a_worker_with_other_code_refuses_a_job(project, monkeypatch):
    exp = opened(project, "here")
    address = (str(exp.root), exp.scale, exp.name, exp.stage, exp.results, json.dumps(exp.overrides))
    assert jobs._work(seen, address, (5,), experiment.code()) == ("sets/norm", 5)
    with pytest.raises(legr.UserError, match=r"^a worker has other code \(in .*\) than the job from .*; start workers"):
        jobs._work(seen, address, (5,), "of another folder")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:9", "two"])
def test_a_scheduler_that_does_not_answer_is_one_sentence(project, address, monkeypatch):
    client = distributed.Client
    monkeypatch.setattr(distributed, "Client", lambda where, timeout: client(where, timeout=1))  # not that patient
    with pytest.raises(legr.UserError, match=rf"^workers is '{address}'; no Dask scheduler answers there[^\n]*$"):
        jobs.run(opened(project, "nobody", workers=address), seen, [(1,)], "numbers")
