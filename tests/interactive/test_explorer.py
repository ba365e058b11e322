"""The explorer: its arithmetic, what its controls do, what its picture shows, and what it saves."""

import asyncio
import io
import json

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from PIL import Image

import legr
from experiments import experiment
from experiments.experiment import open_experiment
from experiments.interactive import explorer as module
from experiments.interactive import samples
from experiments.interactive.cutter import RECALIBRATED, TUNED, Cutter, Tilt
from experiments.interactive.explorer import Explorer
from experiments.stats import paired
from legr import models, training
from legr.files import UserError
from tests.conftest import NAME
from tests.pipeline.test_work import plant

pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # a reader would see it under the controls
SHARES = (1.0, 0.8, 0.6, 0.4)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """An experiment on digits, with results of a shallow network that nothing was trained for. Tests leave them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.MODELS, "resnet8", lambda classes: models.CifarResNet(1, classes))
        patch.setattr(experiment, "check_code", lambda root: None)
        root = plant(tmp_path_factory.mktemp("project"), "resnet8")
        fill(open_experiment("demo", NAME, "explore", "results", root=root))
        yield root


def fill(exp):
    """What the stages would leave: a ranking, curves over FLOPs, and images."""
    random = np.random.default_rng(0)
    layers = len(exp.graph.layers)
    ranking = legr.Ranking(tuple(random.uniform(0.5, 2, layers)), tuple(random.uniform(0, 0.1, layers)))
    ranking.save(exp.path("rankings/legr/ranking-0.json"))
    rows = []
    for worse, method in enumerate(exp.methods):
        flops = [exp.graph.flops(exp.select(method, share)) for share in SHARES]
        accuracy = np.array([0.9, 0.8, 0.6, 0.3]) - 0.05 * worse
        table = pd.DataFrame({"share": SHARES, "flops": flops, "accuracy_recalibrated": accuracy})
        exp.path(f"sets/{method}").mkdir(parents=True)
        table.to_csv(exp.path(f"sets/{method}/cuts.csv"), index=False)
        measured = {"accuracy": accuracy + 0.05, "batch": 4, "latency_ms": 5 + table.flops / 1e6}
        rows.append(table.assign(method=method, target=SHARES, **measured))
    measured = pd.concat(rows)[lambda t: t.share.isin([0.8, 0.4])]
    exp.path("compare").mkdir()
    measured.to_csv(exp.path("compare/tradeoff.csv"), index=False)
    dense = pd.DataFrame([{"method": "dense", "batch": 4, "latency_ms": 9.0, "flops": exp.graph.flops()}])
    pd.concat([measured, dense]).to_csv(exp.path("compare/latency.csv"), index=False)
    samples.write(exp)
    exp.path("explore").mkdir()
    (exp.out / "images.zip").rename(exp.path("explore") / "images.zip")


@pytest.fixture
def exp(project):
    return open_experiment("demo", NAME, "explore", root=project)


@pytest.fixture
def cutter(exp):
    return Cutter(exp)


@pytest.fixture
def explorer(exp):
    return Explorer(exp, "legr", 0.6)


def test_numbers_are_read_off_measured_networks_only(cutter):
    low, middle, high = (cutter.cut("norm", share).numbers for share in (0.6, 0.7, 0.8))
    share = (middle["MFLOPs"] - low["MFLOPs"]) / (high["MFLOPs"] - low["MFLOPs"])
    for name in (RECALIBRATED, TUNED):
        assert middle[name] == pytest.approx(low[name] + share * (high[name] - low[name]))
    assert cutter.cut("norm", 1.0).numbers[TUNED] == pytest.approx(100 * cutter.exp.dense["accuracy"])
    assert sum(map(np.isnan, cutter.cut("norm", 0.35).numbers.values())) == 3  # nothing was measured there
    assert sum(map(np.isnan, cutter.cut("norm", 0.6, {2: Tilt(3.0)}).numbers.values())) == 2  # the accuracies


def test_tilts_of_several_layers_add_up(cutter):
    tilts, norms = {1: Tilt(10.0, 3.0), 5: Tilt(0.2)}, cutter.exp.norms
    learned = cutter.exp.ranking("legr", 0)
    for method, alpha, kappa in (("legr", learned.scale, learned.shift), ("norm", (1.0,) * 7, (0.0,) * 7)):
        alpha, kappa = list(alpha), list(kappa)
        alpha[1], alpha[5], kappa[1] = 10 * alpha[1], 0.2 * alpha[5], kappa[1] + 3 * norms[1].double().numpy().std()
        scores = legr.Ranking(tuple(alpha), tuple(kappa)).scores(norms)
        expected, found = legr.select(cutter.graph, scores, 0.6, floor=0.1), cutter.cut(method, 0.6, tilts)
        assert all(map(torch.equal, expected, found.kept))
        assert found.widths[1] == 16 and found.widths[5] < cutter.cut(method, 0.6).widths[5]


def test_each_layer_has_its_tilt_until_they_are_reset(explorer):
    def states():
        return dict(explorer.tilts), (explorer.layer.value, explorer.scale.value, explorer.shift.value)

    before = explorer.shown.widths
    assert states() == ({}, (max(range(7), key=explorer.cutter.reach("legr", 0.6).__getitem__), 1.0, 0.0))
    assert explorer.reset.disabled
    explorer.layer.value, explorer.scale.value = 1, 10.0
    first = explorer.shown.widths
    assert first[1] > before[1]
    explorer.layer.value = 5
    assert states() == ({1: Tilt(10.0)}, (5, 1.0, 0.0)) and explorer.shown.widths == first
    explorer.shift.value = -2.0
    assert states()[0] == {1: Tilt(10.0), 5: Tilt(1.0, -2.0)} and explorer.untilted.widths == before
    assert explorer.changes.value == "tilted layers: 2 (α × 10, κ + 0 s), 6 (α × 1, κ − 2 s)"
    explorer.layer.value = 1
    assert explorer.scale.value == 10.0
    explorer.scale.value = 1.0
    assert states()[0] == {5: Tilt(1.0, -2.0)}
    explorer.reset.click()
    assert states() == ({}, (1, 1.0, 0.0)) and explorer.shown.widths == before and explorer.reset.disabled


def test_uniform_can_not_be_tilted(explorer):
    explorer.layer.value, explorer.scale.value = 1, 10.0
    explorer.method.value = "uniform"
    assert all(part.disabled for part in (explorer.layer, explorer.scale, explorer.shift, explorer.reset))
    assert explorer.shown is explorer.untilted
    explorer.method.value = "norm"
    assert not explorer.scale.disabled and explorer.tilts == {1: Tilt(10.0)}


def test_a_layer_that_moves_is_chosen_first_and_those_that_can_not_are_marked(explorer):
    explorer.target.value = 0.45
    asyncio.run(explorer._rest_and_judge())
    reach = explorer.cutter.reach("legr", 0.45)
    assert 0 in reach and max(reach) > 0
    marked = {layer: "can not move here" in label for label, layer in explorer.layer.options}
    assert marked == {layer: filters == 0 for layer, filters in enumerate(reach)}
    first, widths = Explorer(explorer.cutter.exp, "legr", 0.6), []
    for scale in (0.1, 10.0):
        first.scale.value = scale
        widths.append(first.shown.widths[first.layer.value])
    assert widths[0] < widths[1]


def test_the_picture_shows_the_cut_beside_another_method_and_the_untilted_ranking(explorer):
    def marks():
        return {line.get_label(): list(line.get_ydata()) for line in explorer.figure.axes[0].lines}

    assert marks() == {"norm-only": explorer.other.widths}
    explorer.layer.value, explorer.scale.value = 1, 10.0
    explorer.beside.value = "uniform"
    assert marks() == {"uniform": explorer.other.widths, "untilted": explorer.untilted.widths}
    assert [bar.get_height() for bar in explorer.bars] == explorer.shown.widths != explorer.other.widths
    explorer.beside.value = explorer.method.value = "legr"
    assert explorer.other is None  # it is not its own neighbour
    assert Image.open(io.BytesIO(explorer.image.value)).width == module.DENSITY * module.WIDTH


def test_a_tilted_network_is_judged_on_the_images_and_against_the_untilted_one(explorer):
    cutter, right = explorer.cutter, []
    explorer.layer.value, explorer.scale.value = 1, 10.0
    explorer.layer.value, explorer.shift.value = 5, -3.0
    found = samples.read(cutter.exp)
    for cut in (explorer.untilted, explorer.shown):
        small = legr.prune(cutter.exp.model, cutter.graph, cut.kept)
        training.recalibrate(small, found.train, cutter.exp.compute)
        right.append(cutter.judge(cut.kept))
        assert right[-1].double().mean() == training.evaluate(small, found.test, cutter.exp.compute)["accuracy"]
    before, after = right
    more, half = paired(before, after)
    assert more == pytest.approx((after.sum() - before.sum()).item() / 500) != 0
    assert half == pytest.approx(1.96 * np.std(after.numpy() - 1.0 * before.numpy(), ddof=1) / np.sqrt(500))
    verdict = explorer.verdict.value.replace("−", "-")
    assert f"on 500 test images, BatchNorm recalibrated, not fine-tuned: <b>{after.double().mean():.1%}</b>" in verdict
    assert f"{100 * more:+.1f} points" in verdict and f"{100 * (more - half):+.1f} to " in verdict
    explorer.reset.click()
    assert f": <b>{before.double().mean():.1%}</b> ± " in explorer.verdict.value


def test_bars_follow_at_once_and_judging_waits_until_nothing_moves(explorer, monkeypatch):
    monkeypatch.setattr(module, "REST", 0.2)
    judged, network = [], explorer.cutter.network
    monkeypatch.setattr(explorer.cutter, "network", lambda kept: (judged.append(kept), network(kept))[1])

    async def drag():
        for target in (0.7, 0.75, 0.8):
            before = explorer.image.value
            explorer.target.value = target
            assert explorer.image.value != before and explorer.verdict.value == "judging …"
            await asyncio.sleep(0.01)
        assert not judged
        await explorer.task

    asyncio.run(drag())
    assert len(judged) == 1 and all(map(torch.equal, judged[0], explorer.shown.kept))
    assert "on 500 test images" in explorer.verdict.value


def test_save_writes_three_files_that_hold_the_same_network(explorer, project):
    explorer.layer.value, explorer.scale.value = 1, 10.0
    explorer.save.click()
    names = explorer.saved.value.removeprefix("saved: ").split(", ")
    weights, note, onnx = (project / name for name in names)
    assert [path.suffix for path in (weights, note, onnx)] == [".safetensors", ".json", ".onnx"]
    about, exp = json.loads(note.read_text()), explorer.cutter.exp
    assert (about["method"], about["target"], about["flops"]) == ("legr", 0.6, 1e6 * explorer.shown.numbers["MFLOPs"])
    assert about["inputs"] == [3, 8, 8] and about["normalization"].keys() == {"mean", "std"}
    scores = legr.Ranking(**about["ranking"]).scores(exp.norms)
    kept = legr.select(exp.graph, scores, about["target"], floor=about["floor"])
    widths = [about["widths"][layer.name] for layer in exp.graph.layers]
    assert widths == [int(mask.sum()) for mask in kept] == explorer.shown.widths
    small = models.load_weights(legr.prune(exp.model, exp.graph, kept), weights).eval()
    inputs = next(samples.read(exp).test[:5].batches(5))[0].contiguous()
    session = onnxruntime.InferenceSession(onnx, providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: inputs.numpy()})
    assert np.allclose(logits, small(inputs).detach().numpy(), atol=1e-4)
    explorer.target.value = 0.7
    assert explorer.saved.value == ""  # that was another network


def test_an_error_leaves_none_of_the_files(explorer, project, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    before = set((project / "playground").rglob("*"))
    explorer.target.value = 0.5
    explorer.save.click()
    assert "can't be written (No space left on device)" in explorer.saved.value
    assert {path for path in set((project / "playground").rglob("*")) - before if path.is_file()} == set()


def test_without_images_all_but_judging_and_saving_works(exp, project):
    images = project / f"results/demo/{NAME}/explore/images.zip"
    aside = images.rename(images.with_suffix(".aside"))
    try:
        explorer = Explorer(exp)
        assert "images.zip do not exist; run the explore stage" in explorer.verdict.value
        before = explorer.image.value
        explorer.target.value = 0.7
        explorer.save.click()
    finally:
        aside.rename(images)
    assert explorer.image.value != before and "images.zip do not exist" in explorer.saved.value


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda exp: Explorer(exp, "random"), "method is 'random'"),
        (lambda exp: Explorer(exp, "norm", 0.3), "target is 0.3"),
        (lambda exp: Cutter(exp).cut("norm", 0.5, {7: Tilt(2.0)}), "tilts has layer 7"),
        (lambda exp: Cutter(exp).cut("uniform", 0.5, {1: Tilt(2.0)}), "uniform has no α and κ to tilt"),
        (lambda exp: Cutter(exp).cut("norm", 0.001), "the lowest reachable fraction"),
    ],
)
def test_mistakes_are_one_sentence(exp, make, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        make(exp)
    assert "\n" not in str(error.value)


def test_a_rendered_notebook_has_the_picture(explorer):
    data, about = explorer._repr_mimebundle_()
    assert {"image/png", "application/vnd.jupyter.widget-view+json"} <= data.keys()
    assert about["image/png"] == {"width": module.WIDTH}
