"""The work of the stages: every result carries a key and is made once; published weights give the recorded accuracy."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import legr
from experiments import records
from experiments.analysis import tables
from experiments.data import datasets, pretrained
from experiments.experiment import open_experiment
from experiments.pipeline import ablations, jobs, work
from experiments.settings import DenseSettings
from legr import models
from legr.files import write_json
from tests.conftest import NAME, PHOTOS, PROJECT, settle

TRIED = {"search at 50%": 0.5, "search at 90%": 0.9}  # for the ablations' candidates


def plant(folder, model="resnet56"):
    """A project of tiny runs on digits of 8 pixels, with its images and a dense network of random weights."""
    section = yaml.safe_load((PROJECT / "params.yaml").read_text())["demo"][NAME]
    section["data"] |= {"resolution": 8}
    section |= {"model": model, "targets": [0.5], "compute": {"device": "cpu", "precision": "float32"}}
    section["dense"]["recipes"] = [{"epochs": 1, "batch_size": 64, "lr": 0.05}]
    for ranking in section["rankings"].values():
        ranking |= {"search": {"population": 3, "evaluations": 6, "sample": 2}, "fitness": {"validation_images": 50}}
    section["finetune"] = {"recipe": {"epochs": 1, "batch_size": 64, "lr": 0.02}, "recalibration_images": 64}
    searches = {name: dict(section["rankings"]["legr"], targets=[target]) for name, target in TRIED.items()}
    section["ablations"] |= {"rankings": 4, "steps": 1, "fitness": {"as pruned": {"validation_images": 50}}}
    section["ablations"]["candidates"] = searches
    params = {"scale": "demo", "methods": {"learned": ["legr"], "plain": ["norm", "uniform"]}, "demo": {NAME: section}}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    exp = open_experiment("demo", NAME, "dense", root=folder)
    datasets.prepare(exp.settings.data, folder, exp.prepared)
    pipelines = folder / "results" / "demo" / NAME / "dense"
    models.save_weights(models.build(model, 10, 0), pipelines / "network.safetensors")
    write_json(pipelines / "dense.json", {"accuracy": 0.1})
    return folder


@pytest.fixture
def project(tmp_path, monkeypatch):
    """With a network of the same kind as ResNet-56, but shallow."""
    monkeypatch.setitem(models.MODELS, "resnet8", lambda classes: models.CifarResNet(1, classes))
    return plant(tmp_path, "resnet8")


@pytest.fixture
def trained(monkeypatch):
    """The recipes' epochs of every training and search that really happened."""
    happened = []

    def noted(function):
        return lambda *args, **kwargs: (happened.append(function.__name__), function(*args, **kwargs))[1]

    monkeypatch.setattr(work.training, "train", noted(work.training.train))
    monkeypatch.setattr(work.legr, "learn_ranking", noted(work.legr.learn_ranking))
    return happened


def opened(project, stage, overrides=None):
    return open_experiment("demo", NAME, stage, "playground", overrides, project)


def test_a_dense_network_is_trained_once_and_its_file_gives_the_recorded_accuracy(project, trained):
    longer = {"dense.recipes": [{"epochs": 3, "batch_size": 32, "lr": 0.05}]}
    exp = opened(project, "dense", longer)
    first = work.train_dense(exp)
    assert (first["epochs"], first["train_images"], first["test_images"]) == (3, 998, 599)
    assert work.train_dense(opened(project, "dense", longer)) == first
    assert trained == ["train"]
    model = models.load_weights(models.build("resnet8", 10, 1), exp.out / "network.safetensors")
    found = legr.training.evaluate(model, exp.data.test, exp.compute)
    assert found["accuracy"] == pytest.approx(first["accuracy"], abs=1e-6) and first["accuracy"] > 0.2  # it learned
    assert first["flops"] == exp.graph.flops()


def test_a_ranking_is_learned_once_and_anew_in_every_trial(project, trained):
    exp = opened(project, "rankings/legr")
    first = work.learn(exp, "legr", 0)
    assert work.learn(opened(project, "rankings/legr"), "legr", 0) == first
    assert trained == ["learn_ranking"]
    work.learn(exp, "legr", 1)
    assert exp.ranking("legr", 0) != exp.ranking("legr", 1)
    history = pd.read_csv(exp.out / "search-0.csv")
    assert len(history) == first["evaluations"] == 6 and first["loss"] == pytest.approx(history.loss.min())
    assert first["loss_of_norm_only"] == pytest.approx(history.loss[2])  # the last of the initial population
    assert trained == ["learn_ranking"] * 2


def test_a_network_is_trained_once_and_its_file_gives_the_recorded_accuracy(project, trained):
    exp = opened(project, "sets/norm", {"finetune.recipe.epochs": 2})
    first = work.train_network(exp, "norm", 0.5, 0)
    assert first["flops_ratio"] < 0.5 and first["flops"] == exp.graph.flops(exp.select("norm", 0.5))
    assert work.train_network(opened(project, "sets/norm", {"finetune.recipe.epochs": 2}), "norm", 0.5, 0) == first
    assert trained == ["train"]
    small = opened(project, "sets/norm").network("norm", 0.5)
    found = legr.training.evaluate(small, exp.data.test, exp.compute)
    assert found["accuracy"] == pytest.approx(first["accuracy"], abs=1e-6)
    assert [small.get_submodule(layer.name).out_channels for layer in exp.graph.layers] == first["widths"]
    assert pd.read_csv(exp.out / "0.5-0.csv").epoch.tolist() == [0, 1, 2]
    second = work.train_network(exp, "norm", 0.5, 1)
    assert second["files"] == ["0.5-1.csv"] and second["test_loss"] != first["test_loss"]  # another seed; not published
    assert trained == ["train"] * 2


@pytest.mark.parametrize(
    ("overrides", "other"),
    [
        ({"rankings.legr.fitness.lr": 0.01, "rankings.legr.search.seed": 7, "floor": 0.1}, False),  # as by default
        ({"compute.device": "cuda", "workers": 3, "trials": 2}, False),
        ({"compute.precision": "bfloat16"}, True),
        ({"floor": 0.3}, True),
    ],
)
def test_a_key_holds_what_is_said_and_not_what_is_left_as_it_is(project, overrides, other):
    def wanted(overrides):
        exp = opened(project, "rankings/legr", overrides)
        return work.ranking_made_of(exp, exp.settings.rankings["legr"], 1, False)

    before = wanted({})
    assert before["settings"]["ranking"] == {
        "targets": [0.47],
        "search": {"population": 3, "evaluations": 6, "sample": 2},
        "fitness": {"validation_images": 50},
    }
    assert (wanted(overrides) != before) == other


def test_networks_are_those_of_their_own_ranking_and_version(project, trained, monkeypatch):
    """A ranking that comes out otherwise makes other networks; one that orders filters the same keeps them."""

    def network():
        return work.train_network(opened(project, "sets/legr"), "legr", 0.5, 0)

    exp = opened(project, "rankings/legr")
    work.learn(exp, "legr", 0)
    first, ranking = network(), exp.ranking("legr", 0)
    monkeypatch.setitem(records.VERSIONS, "ranking", 2)
    work.learn(opened(project, "rankings/legr"), "legr", 0)
    assert network() == first and trained == ["learn_ranking", "train", "learn_ranking"]
    legr.Ranking(*(tuple(2 * np.array(part)) for part in (ranking.scale, ranking.shift))).save(
        exp.out / "ranking-0.json"
    )
    assert network() == first
    layers = len(exp.norms)
    legr.Ranking((1.0,) * layers, tuple(np.linspace(0, 9, layers))).save(exp.out / "ranking-0.json")
    second = network()
    assert second["widths"] != first["widths"]
    monkeypatch.setitem(records.VERSIONS, "network", 2)
    assert network()["key"] != second["key"] and trained[3:] == ["train", "train"]


def test_weights_from_elsewhere_are_an_input_by_their_content(project, monkeypatch):
    """Where they can't be had, they are taken to be those of the dense network that is there."""
    overrides = {"dense.weights": "w.safetensors", "dense.recipes": []}
    models.save_weights(models.build("resnet8", 10, 1), project / "w.safetensors")
    first = work.train_dense(opened(project, "dense", overrides))
    models.save_weights(models.build("resnet8", 10, 2), project / "w.safetensors")
    second = work.train_dense(opened(project, "dense", overrides))
    assert first["made_of"]["inputs"]["weights"] != second["made_of"]["inputs"]["weights"]
    (project / "w.safetensors").unlink()
    assert work.train_dense(opened(project, "dense", overrides)) == second
    with pytest.raises(legr.UserError, match="dense.weights is 'w.safetensors' and can't be used"):
        work.train_dense(opened(project, "dense", overrides | {"dense.seed": 3}))


def test_a_ranking_is_cut_many_times_once(project, monkeypatch):
    few = {"cuts": {"number": 4, "test_images": 100}}
    exp = opened(project, "sets/norm", few)
    work.cut_everywhere(exp, "norm")
    cuts = pd.read_csv(exp.out / "cuts.csv")
    assert cuts.share.tolist() == [1, 0.8333, 0.6667, 0.5]
    assert cuts.flops[0] == exp.graph.flops() and (cuts.flops[1:] < exp.graph.flops() * cuts.share[1:]).all()
    kept = exp.select("norm", 0.5)
    assert cuts.widths[3] == " ".join(str(int(mask.sum())) for mask in kept)
    picked = torch.randperm(599, generator=torch.Generator().manual_seed(0))[:100]
    assert cuts.accuracy_recalibrated[3] == pytest.approx(work.recalibrated_accuracy(exp, kept, exp.data.test[picked]))
    monkeypatch.setattr(work, "recalibrated_accuracy", None)  # nothing is measured again
    again = opened(project, "sets/norm", few)
    work.cut_everywhere(again, "norm")
    assert pd.read_csv(exp.out / "cuts.csv").equals(cuts)


def test_ablations_are_made_once_and_an_interrupted_one_measures_only_what_is_missing(project, monkeypatch):
    exp = opened(project, "ablations")
    call, measured = ablations.Fitness.__call__, []
    monkeypatch.setattr(ablations.Fitness, "__call__", lambda self, kept: (measured.append(kept), call(self, kept))[1])

    def stop(exp, function, each, what):
        if what == "searches":
            raise KeyboardInterrupt
        return jobs.run(exp, function, each, what)

    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(ablations, "jobs", SimpleNamespace(run=stop))
        ablations.ablate(exp)
    before = len(measured)
    candidates = len(TRIED) * 6  # evaluations of the searches for candidates
    assert candidates < before <= candidates + 4 * (1 + 1)  # rankings, some of them the same, by a fitness and a seed
    record = ablations.ablate(exp)
    searched = 2 * 8  # evaluations of two values of τ̂
    assert before < len(measured) <= before + searched + 2  # and a seed of what they found
    assert pd.read_csv(exp.out / "fitness.csv").source.tolist() == ["norm", *TRIED, "random"]
    assert len(pd.read_csv(exp.out / "searches.csv")) == 1 + 2  # norm-only and two values of τ̂
    after = len(measured)
    assert ablations.ablate(opened(project, "ablations")) == record and len(measured) == after
    one_more = {"ablations.fitness.recalibrated": {"recalibration_images": 64}}
    ablations.ablate(opened(project, "ablations", one_more))
    assert len(measured) == after + 3  # one fitness more is measured for each ranking, and nothing else
    record = ablations.ablate(opened(project, "ablations", {"ablations.vary": {}}))  # asks for no searches
    assert record["files"] == ["fitness.csv", "measurements.json"] and len(measured) == after + 3


def test_the_cost_of_a_set_is_of_one_machine(tmp_path):
    for trial, (hardware, seconds) in enumerate((("a CPU", 7200), ("a GPU", 36))):
        write_json(tmp_path / f"rankings/legr/record-{trial}.json", {"hardware": hardware, "seconds": seconds})
    seconds = {0.7: ["a CPU", 3600], 0.5: ["a CPU", 7200], 0.3: ["a GPU", 30]}
    table = pd.DataFrame(
        [["legr", t, *row] for t, row in seconds.items()], columns=["method", "target", "hardware", "seconds"]
    )
    settings = SimpleNamespace(rankings={"legr": None})
    exp = SimpleNamespace(settings=settings, trials=lambda method: range(2), path=lambda name: tmp_path / name)
    cost = tables.set_cost(exp, table)
    assert cost.set_index("networks")["one search"][2] == 2 + 2 * 1.5 and cost.ratio[0] == 1


def test_the_papers_networks_stand_beside_its_own_experiments_only():
    papers = tables.papers_networks(open_experiment("paper", NAME, "compare", root=PROJECT))
    found = papers[papers.network.str.startswith("LeGR")].set_index("mflops").accuracy_percent
    assert found[58.9] == 93.7 and found[87.8] == 94.1
    for scale, name in (("demo", NAME), ("laptop", PHOTOS)):
        assert tables.papers_networks(open_experiment(scale, name, "compare", root=PROJECT)) is None


def test_the_authors_mobilenets_have_the_flops_that_they_published():
    exp = dataclasses.replace(open_experiment("paper", PHOTOS, "compare", root=PROJECT), methods=[])
    graph = legr.trace(models.build("mobilenet_v2", 1000, 0), torch.zeros(1, 3, 224, 224), check=False)
    theirs = {name: kept for name, (kept,) in tables.beside_authors(exp).items()}
    found = {name: graph.flops(kept) for name, kept in theirs.items()}
    assert found == {"paper 70%": 210_516_076, "paper 60%": 180_440_219, "paper 50%": 150_376_273}
    kept = tables.blocks_kept(SimpleNamespace(graph=graph, settings=exp.settings), {"paper": list(theirs.values())})
    assert kept.values.tolist() == [["paper", "17, 17, 17", "4, 6, 7"]]
    assert tables.beside_authors(open_experiment("paper", NAME, "compare", root=PROJECT)) == {}


@pytest.mark.parametrize("weights", ["w.safetensors", "torchvision"])
def test_weights_keep_just_the_outputs_of_the_classes_also_when_brought_to_one_scale(tmp_path, monkeypatch, weights):
    """A file named in params.yaml, or by the environment in place of the download."""
    thousand, model = settle(models.build("mobilenet_v2", 1000, 1)), models.build("mobilenet_v2", 3, 0)
    models.save_weights(thousand, tmp_path / "w.safetensors")
    torch.save({"state_dict": thousand.state_dict()}, tmp_path / "w.pth.tar")
    monkeypatch.setenv("LEGR_MOBILENET_V2", str(tmp_path / "w.pth.tar"))
    settings = SimpleNamespace(dense=DenseSettings(weights=weights, rescale=True), model="mobilenet_v2")
    classes = ["n01440764", "n02102040", "n03888257"]
    name = {"weights": weights.replace("torchvision", "w.pth.tar")}
    assert pretrained.start(model, settings, classes, tmp_path) == name
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = thousand(x)[:, [0, 217, 701]]  # sorted WordNet ids are ImageNet's order
        assert torch.allclose(model.eval()(x), expected, atol=5e-3)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    medians = torch.stack([c.weight.flatten(1).norm(dim=1).median() for c in convolutions])
    torch.testing.assert_close(medians, torch.ones(52))


def test_correlations_over_all_rankings_and_within_kinds():
    """Five of one kind are in exactly the order of the loss; their interval stays above −1 all the same."""
    loss = pd.Series(range(10), dtype=float)
    table = pd.DataFrame({"target": 0.5, "source": ["legr"] * 5 + ["random"] * 4 + ["norm"], "loss": loss})
    table["accuracy"] = 1 - loss / 10 + np.array([0.0] * 9 + [0.3])  # the last one is out of order
    found = tables.correlations(table, ["loss"]).set_index("rankings of")
    assert found["count"].to_dict() == {"all": 10, "legr": 5, "random": 4}
    assert found.spearman["legr"] == -1 and -1 < found.low["legr"] < found.high["legr"] < 0
    rho = table[["loss", "accuracy"]].corr("spearman").iloc[0, 1]
    assert found.spearman["all"] == rho and found.low["all"] < rho < found.high["all"]
    half = 1.96 * np.sqrt((1 + rho**2 / 2) / 7)
    assert np.arctanh(found.high["all"]) - np.arctanh(found.low["all"]) == pytest.approx(2 * half)
