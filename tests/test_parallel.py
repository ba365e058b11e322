"""Candidates judged elsewhere: the same search on every executor, and workers that die."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest
import torch
from distributed import Client, LocalCluster

import legr
from legr.errors import UserError
from legr.fitness import Fitness, FitnessSettings
from legr.parallel import Judges, LocalWorkers
from legr.search import SearchSettings, learn_ranking

SETTINGS = SearchSettings(population=6, evaluations=20, sample=3, in_flight=3, racing=0.5)
FITNESS = FitnessSettings(kind="recalibrated", recalibration_images=32)


class LastFirst(Executor):
    """Does what was submitted last first, and only when a result is asked for."""

    def __init__(self):
        self.waiting = []

    def submit(self, function, /, *args, **kwargs):
        future = Future()
        future.result = lambda timeout=None, real=future.result: self.work() or real()
        self.waiting.append((future, function, args, kwargs))
        return future

    def work(self):
        while self.waiting:
            future, function, args, kwargs = self.waiting.pop()
            future.set_result(function(*args, **kwargs))


@pytest.fixture
def search(small, digits, compute):
    before = torch.get_num_threads()

    def learn(executor, settings=SETTINGS, threads=before, **more):
        """With one thread, the result of a worker that has one is the same to the bit."""
        own = compute.model_copy(update={"threads": threads})
        return learn_ranking(*small, digits, 0.6, settings, FITNESS, own, executor=executor, **more)

    yield learn
    torch.set_num_threads(before)


def same(one, other):
    assert one.ranking == other.ranking
    assert one.candidates == other.candidates
    assert one.history.drop(columns="seconds").equals(other.history.drop(columns="seconds"))


def test_the_result_depends_on_the_settings_alone(search):
    here = search(None)
    same(here, search(LastFirst()))
    with ThreadPoolExecutor(2) as executor:
        same(here, search(executor))
    assert search(None, SETTINGS.model_copy(update={"in_flight": 1})).candidates != here.candidates


def test_on_processes_even_when_they_die(search):
    here = search(None, threads=1)
    with LocalWorkers(2) as executor:

        def kill(row):
            if row["evaluation"] in (3, 11):
                os.kill(next(iter(executor.pool._processes)), signal.SIGKILL)

        same(here, search(executor, log=kill, threads=1))


def test_on_a_dask_cluster(search):
    here = search(None, threads=1)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        client.run(torch.set_num_threads, 1)
        same(here, search(client.get_executor(), threads=1))


def test_a_search_killed_on_processes_goes_on_and_leaves_none_behind(tmp_path):
    script = tmp_path / "search.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        from pathlib import Path
        import torch
        import legr
        from experiments.datasets import DataSettings, prepare
        from legr import data
        from legr.fitness import FitnessSettings
        from legr.models import CifarResNet
        from legr.parallel import LocalWorkers
        from legr.search import SearchSettings
        from legr.training import Compute

        def main(folder):
            torch.manual_seed(0)
            if not (folder / "d").exists():
                prepare(DataSettings(name="digits", holdout=100), folder, folder / "d")
            model = CifarResNet(1)
            graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
            settings = SearchSettings(population=5, evaluations=40, sample=2, in_flight=2)
            with LocalWorkers(2) as executor:
                def log(row):
                    print(row["evaluation"], *executor.pool._processes, flush=True)
                legr.learn_ranking(model, graph, data.load(folder / "d"), 0.6, settings,
                    FitnessSettings(validation_images=50), Compute(device="cpu", precision="float32"),
                    folder / "state", log, executor=executor).ranking.save(folder / "ranking.json")

        if __name__ == "__main__":
            main(Path(sys.argv[1]))
        """)
    )
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    process = subprocess.Popen([sys.executable, script, killed], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in process.stdout.readline().split()[1:]]
    process.kill()
    process.wait()
    assert len(workers) == 2
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)
    for folder in (killed, whole):
        output = subprocess.run([sys.executable, script, folder], check=True, capture_output=True, text=True).stdout
        assert folder == whole or not output.startswith("1 ")
    assert (killed / "ranking.json").read_bytes() == (whole / "ranking.json").read_bytes()


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_the_fitness_is_sent_to_a_worker_once(small, digits, compute):
    model, graph = small
    sent = []

    class Counting(ThreadPoolExecutor):
        def submit(self, function, name, fitness, *rest):
            sent.append(fitness)
            return super().submit(function, name, fitness, *rest)

    with Counting(1) as executor:
        judges = Judges(Fitness(model, graph, digits, 0.6, FITNESS, compute, seed=5), executor)
        tasks = [judges.submit(legr.Ranking.norm_only(7)) for _ in range(4)]
        assert len({judges.result(task)["loss"] for task in tasks}) == 1
    assert sum(fitness is not None for fitness in sent) <= 4  # those in flight when it was missing
    later = len(sent)
    with Counting(1) as executor:
        judges.executor = executor
        judges.result(judges.submit(legr.Ranking.norm_only(7)))
    assert all(fitness is None for fitness in sent[later:])


def test_an_executor_that_never_answers_is_one_sentence(small, digits, compute):
    class Broken(Executor):
        def submit(self, *_args, **_kwargs):
            future = Future()
            future.set_exception(MemoryError("no room"))
            return future

    settings = SearchSettings(population=2, evaluations=2, sample=1)
    with pytest.raises(UserError, match="executor failed 3 times to judge one candidate .*no room"):
        learn_ranking(*small, digits, 0.6, settings, FITNESS, compute, executor=Broken())


def test_an_impossible_target_is_said_at_once(small, digits, compute):
    with (
        ThreadPoolExecutor(1) as executor,
        pytest.raises(UserError, match="lowest reachable"),
    ):
        learn_ranking(*small, digits, 0.0001, SETTINGS, FITNESS, compute, executor=executor)


@pytest.mark.parametrize("count", [0, -1])
def test_workers_are_at_least_one(count):
    with pytest.raises(UserError, match=f"workers is {count}; it must be at least 1"):
        LocalWorkers(count)
