"""What runs on a GPU gives what the CPU gives: on a pretend one everywhere, on a real one where there is one."""

import copy
import warnings

import pandas as pd
import pytest
import torch
from torch import nn

import legr
from legr.files import tensors_digest
from legr.fitness import Fitness, FitnessSettings
from legr.latency import measure
from legr.models import CifarResNet
from legr.search import SearchSettings
from legr.training import Compute, Recipe, Step, train
from tests.library.pretend import pretend_gpu
from tests.library.test_training import dropping, fresh

CUDA, CPU = Compute(device="cuda", precision="float32"), Compute(device="cpu", precision="float32")
PLAIN = CUDA.model_copy(update={"graphs": False})
REAL = pytest.param(
    "real", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
)


@pytest.fixture(params=["pretend", REAL])
def gpu(request, monkeypatch):
    """The pretend GPU, or None for the real one."""
    if request.param == "pretend":
        with pretend_gpu() as pretended:
            yield pretended
    else:
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")  # no TF32
        yield None


def trained(make, images, compute, **options):
    """Weights, history."""
    model = fresh(make)
    recipe = Recipe(epochs=3, batch_size=32, lr=0.05, schedule="onecycle", resolutions=((0.4, 16),), ema=0.9)
    history = train(model, images.to(compute.device), recipe, compute, seed=3, **options).drop(columns="seconds")
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}, history


@pytest.mark.parametrize("make", [lambda: CifarResNet(1), dropping], ids=["resnet8", "with dropout"])
def test_training_by_graphs_is_plain_training_to_the_bit_and_the_cpus_but_for_rounding(gpu, digits, make):
    images, held_out = digits.fit[:160], digits.holdout[:50]
    weights, history = trained(make, images, CUDA, validation=held_out.to("cuda"))
    if gpu:
        assert gpu.graphs == 2  # one for each side
    plain, same = trained(make, images, PLAIN, validation=held_out.to("cuda"))
    assert tensors_digest(weights) == tensors_digest(plain)
    pd.testing.assert_frame_equal(history, same)
    if gpu or make is not dropping:  # a real GPU draws other numbers
        _, here = trained(make, images, CPU, validation=held_out)
        pd.testing.assert_frame_equal(history, here, rtol=0.02 if gpu else 0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compute", [CUDA, PLAIN], ids=["graphs", "plain"])
def test_steps_do_not_wait_for_a_real_device(digits, compute):
    step = Step(fresh().to("cuda"), Recipe(epochs=1, batch_size=32, lr=0.05), compute, 9)
    ((inputs, labels), *_) = digits.fit[:32].to("cuda").batches(32)
    for _ in range(5):
        step(inputs, labels, 0.1)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(inputs, labels, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "settings",
    [{"steps": 5, "batch_size": 16}, {"recalibration_images": 64}],
    ids=["τ̂ = 5", "recalibrated"],
)
def test_a_search_on_a_gpu_asks_for_the_same_candidates(gpu, small, digits, settings):
    kind, search = FitnessSettings(validation_images=64, **settings), SearchSettings(population=3, evaluations=6)
    found = [
        legr.learn_ranking(*small, digits, 0.6, search=search, fitness=kind, compute=compute) for compute in (CPU, CUDA)
    ]
    assert found[0].candidates == found[1].candidates
    rounding = 1e-2 if kind.steps else 1e-3  # steps of training make more of it: 1.3e-3 on an H200
    assert found[1].history.loss.tolist() == pytest.approx(found[0].history.loss.tolist(), rel=rounding)
    model, graph = copy.deepcopy(small[0]).to("cuda", memory_format=torch.channels_last), small[1]
    assert all(map(torch.equal, legr.filter_norms(model, graph), legr.filter_norms(*small)))
    fitness = Fitness(model, graph, digits.to("cuda"), [0.6], kind, CUDA)
    loss = fitness(fitness.select(found[0].candidates[0]))["loss"]
    assert loss == pytest.approx(found[0].history.loss[0], rel=rounding)


def test_latencies_are_of_graphs(gpu, small):
    model, graph = copy.deepcopy(small[0]).to("cuda"), small[1]
    kept = legr.select(graph, legr.filter_norms(model, graph), 0.5)
    networks = {"dense": model, "pruned": legr.prune(model, graph, kept)}
    times = measure(networks, graph.inputs, (1, 4), CUDA, 2)
    assert len(times) == 4 and (times.low_ms > 0).all()
    if gpu:
        assert gpu.graphs == 4


def test_what_cannot_be_recorded_is_one_sentence_and_runs_without_graphs(gpu, digits):
    def averaging():
        return nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8, momentum=None), nn.Flatten(), nn.LazyLinear(10))

    images, recipe = digits.fit[:64].to("cuda"), Recipe(epochs=1, batch_size=8, lr=0.01)
    model = fresh(averaging)
    model(torch.zeros(2, 3, 32, 32))
    with pytest.raises(legr.UserError, match=r"^a training step .* set compute\.graphs to false: [^\n]*captur"):
        train(copy.deepcopy(model), images, recipe, CUDA, seed=0)
    assert train(model, images, recipe, PLAIN, seed=0).train_loss[0] < 4


def test_a_gpu_that_cannot_be_used_is_said(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("the GPU here can be used")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # visible to the driver, and PyTorch can't run on it
    with pytest.warns(UserWarning, match=r"^this machine's GPU can't be used, so the CPU is: [^\n]+$"):
        assert Compute().resolve().device == "cpu"
    with pytest.raises(legr.UserError, match=r"^device is 'cuda'; this machine can't use it [^\n]+$"):
        CUDA.resolve()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Compute().resolve().device == "cpu"


@pytest.mark.parametrize(("capability", "precision"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_bfloat16_is_for_cards_that_do_not_emulate_it(monkeypatch, capability, precision):
    with pretend_gpu():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        assert Compute().resolve() == Compute(device="cuda", precision=precision)
