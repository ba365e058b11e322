"""Recipes, training that resumes to the same bits, evaluation, recalibration."""

from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import legr
from legr import training
from legr.data import Normalization
from legr.files import tensors_digest
from legr.models import CifarResNet
from legr.training import Compute, Recipe, evaluate, recalibrate, take_steps, train
from tests.conftest import Inverted


def fresh(make=lambda: CifarResNet(1)):
    torch.manual_seed(0)
    return make()


def dropping():
    first = nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.3)
    return nn.Sequential(*first, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))


def test_the_papers_schedules():
    baseline = Recipe(epochs=200, lr=0.1)
    at = [baseline.learning_rate(e / 200) for e in (0, 59, 60, 119, 120, 159, 160, 199)]
    assert at == pytest.approx([0.1, 0.1, 0.02, 0.02, 0.004, 0.004, 0.0008, 0.0008])
    cycle = Recipe(epochs=10, lr=0.2, schedule="onecycle", warmup=0.2)
    assert [cycle.learning_rate(x) for x in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.1, 0.2, 0.1, 0.0], abs=1e-7)
    decaying = Recipe(epochs=350, lr=0.064, schedule="exponential", gamma=0.97, every=2.4)
    at = [decaying.learning_rate(epoch / 350) for epoch in (0, 2.39, 2.4, 4.79, 4.8, 348)]
    assert at == pytest.approx([0.064, 0.064, 0.064 * 0.97, 0.064 * 0.97, 0.064 * 0.97**2, 0.064 * 0.97**145])
    growing = Recipe(epochs=10, lr=0.1, resolutions=((0.3, 16), (0.5, 24)))
    assert [growing.side(epoch) for epoch in (0, 2, 3, 4, 5, 9)] == [16, 16, 24, 24, None, None]
    (group,) = baseline.optimizer(nn.Linear(1, 1)).param_groups
    assert (group["momentum"], group["nesterov"], group["weight_decay"], group["dampening"]) == (0.9, True, 5e-4, 0)


def test_a_training_interrupted_after_any_epoch_ends_the_same(digits, compute, tmp_path):
    part = digits.fit[:128]
    options = {"seed": 3, "validation": digits.holdout[:50]}
    recipe = Recipe(epochs=3, batch_size=32, lr=0.05, schedule="onecycle", resolutions=((0.4, 16),), ema=0.9)
    whole = fresh(dropping)
    expected = train(whole, part, recipe, compute, **options).drop(columns="seconds")
    for last in (1, 2):

        def stop(row, last=last):
            if row["epoch"] == last:
                raise KeyboardInterrupt

        options["state_folder"] = tmp_path / f"{last}"
        with pytest.raises(KeyboardInterrupt):
            train(fresh(dropping), part, recipe, compute, **options, log=stop)
        resumed, seen = fresh(dropping), []
        torch.manual_seed(last)  # another process draws other numbers
        history = train(resumed, part, recipe, compute, **options, log=seen.append)
        assert [row["epoch"] for row in seen] == list(range(last + 1, 4))
        pd.testing.assert_frame_equal(history.drop(columns="seconds"), expected)
        assert tensors_digest(resumed.state_dict()) == tensors_digest(whole.state_dict())
    options["seed"] = 4
    assert not train(fresh(dropping), part, recipe, compute, **options).drop(columns="seconds").equals(expected)


class Dropping(nn.Sequential):
    """The same weights, and another computation by a number that neither names nor public attributes show."""

    def __init__(self, p):
        super().__init__(CifarResNet(1))
        self._p = p

    def forward(self, x):
        return nn.functional.dropout(super().forward(x), self._p, self.training)


def frozen(model):
    model[0].conv1.weight.requires_grad = False
    return model


@pytest.mark.parametrize("make", [lambda: Dropping(0.5), lambda: frozen(Dropping(0))], ids=["dropout", "frozen"])
def test_a_training_by_other_code_or_of_another_network_starts_anew(
    digits, compute, tmp_path, capsys, monkeypatch, make
):
    options, seen = {"seed": 0, "state_folder": tmp_path}, []
    part, recipe = digits.fit[:64], Recipe(epochs=1, batch_size=32, lr=0.05)
    train(fresh(lambda: Dropping(0)), part, recipe, compute, **options)
    train(fresh(lambda: Dropping(0)), part, recipe, compute, **options, log=seen.append)
    assert not seen and not capsys.readouterr().err  # the same network is not trained again
    train(fresh(make), part, recipe, compute, **options, log=seen.append)
    assert len(seen) == 1
    expected = f"{tmp_path}: a training begun by other code or with another network starts anew\n"
    assert capsys.readouterr().err == expected
    monkeypatch.setattr(training, "code_digest", lambda: "other")
    train(fresh(make), part, recipe, compute, **options, log=seen.append)
    assert len(seen) == 2


def test_steps_are_sgd_with_label_smoothing_and_training_leaves_the_moving_average(digits, compute):
    """In plain PyTorch: AveragedModel, but that the average starts at the weights before the first step."""
    recipe = Recipe(epochs=2, batch_size=32, lr=0.1, schedule="exponential", every=1, label_smoothing=0.1, ema=0.8)
    model, plain = fresh(Inverted), fresh(Inverted)
    history = train(model, digits.fit[:96], recipe, compute, seed=1, validation=digits.holdout)
    plain = plain.to(memory_format=torch.channels_last).train()
    averaged = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    averaged.n_averaged += 1
    optimizer = torch.optim.SGD(plain.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.2**epoch
        for inputs, labels in digits.fit[:96].augmented_batches(32, torch.Generator().manual_seed(1_000_003 + epoch)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(plain(inputs), labels, label_smoothing=0.1).backward()
            optimizer.step()
            averaged.update_parameters(plain)
    expected = averaged.module.state_dict()
    for name, tensor in model.state_dict().items():
        assert "num_batches" in name or torch.equal(tensor, expected[name]), name
    assert not torch.equal(model.linear.weight, plain.linear.weight)
    assert evaluate(model, digits.holdout, compute)["loss"] == history.val_loss.iloc[-1]


def test_what_goes_wrong_is_one_sentence(digits, compute):
    with pytest.raises(legr.UserError, match=r"lr is 1e\+30; the loss became .* in epoch 1, so it must be smaller"):
        train(fresh(), digits.fit[:64], Recipe(epochs=1, batch_size=8, lr=1e30), compute, seed=0)
    for device in ("abacus", "mps", "mps:0", "meta"):
        with pytest.raises(legr.UserError, match=f"^device is '{device}'; it must be auto, cpu, or cuda with a GPU$"):
            Compute(device=device).resolve()


class TwoHeads(nn.Sequential):
    def forward(self, x):
        return super().forward(x), x


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TwoHeads(CifarResNet(1)), "the network gives tuple for images .*; it must give logits"),
        (lambda: CifarResNet(1).blocks, r"the network can't be run on images \[3, 32, 32\]: .*expected .*16 channels"),
        (lambda: CifarResNet(1, 7), "the network has 7 outputs; labels of the images go up to 9"),
    ],
    ids=["two heads", "other channels", "too few classes"],
)
def test_images_that_do_not_fit_the_network_are_refused_in_one_sentence(digits, compute, make, message):
    model = make().train()
    before = tensors_digest(dict(model.named_parameters()))
    for act in (
        lambda: evaluate(model, digits.train, compute),
        lambda: train(model, digits.train, Recipe(epochs=1, lr=1), compute, seed=0),
        lambda: take_steps(model, digits.train, Recipe(epochs=1, lr=1), 1, compute, 0),
    ):
        with pytest.raises(legr.UserError, match=f"^{message}") as error:
            act()
        assert "\n" not in str(error.value)
    assert model.training and tensors_digest(dict(model.named_parameters())) == before
    with pytest.raises(legr.UserError, match=r"can't be run on images \[3, 32, 32\]"):
        recalibrate(CifarResNet(1).blocks, digits.train, compute)


def test_the_network_is_judged_on_inputs_as_it_was_trained(digits, compute):
    raw, model = (replace(digits.train, normalization=Normalization.model_validate("raw")), fresh())
    with torch.inference_mode():
        expected = nn.functional.cross_entropy(model.eval()(raw.pixels.float()), raw.labels).item()
    assert evaluate(model, raw, compute)["loss"] == pytest.approx(expected, rel=1e-4)
    assert evaluate(model, digits.train, compute)["loss"] != pytest.approx(expected, rel=0.1)
    assert raw.digest() != digits.train.digest()


@pytest.mark.parametrize("count", [16, 100])
def test_steps_are_as_many_as_asked_however_small_the_set(digits, compute, count):
    models = [fresh(dropping), fresh(dropping)]
    for model in models:
        take_steps(model, digits.fit[:count], Recipe(epochs=1, batch_size=32, lr=0.01), 7, compute, seed=0)
        assert model[1].num_batches_tracked == 7
    assert torch.equal(models[0][-1].weight, models[1][-1].weight)


def test_evaluation_is_the_mean_over_the_images_whatever_the_number_of_threads(digits, compute):
    model, before, found = fresh().train(), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(evaluate(model, digits.train, compute))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert model.training and found[0] == found[1]
    with torch.inference_mode():
        logits = model.eval()(Normalization()(digits.train.pixels))
    expected = nn.functional.cross_entropy(logits, digits.train.labels).item()
    right = (logits.argmax(1) == digits.train.labels).double().mean().item()
    assert found[0] == {"loss": pytest.approx(expected, rel=1e-5), "accuracy": right}


def test_recalibrated_statistics_are_the_average_over_the_batches(digits, compute):
    model, plain, part = fresh().eval(), fresh().train(), digits.fit[:510]
    recalibrate(model, part, compute)
    norms, seen = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)], []
    for inputs, _ in part.batches(250):
        for norm in norms:
            norm.momentum = 1.0  # of this batch alone
        plain(inputs)
        seen.append([torch.stack([norm.running_mean, norm.running_var]) for norm in norms])
    assert not model.training
    for found, *expected in zip((m for m in model.modules() if isinstance(m, nn.BatchNorm2d)), *seen, strict=True):
        mean = torch.stack([found.running_mean, found.running_var])
        torch.testing.assert_close(mean, torch.stack(expected).mean(0), rtol=1e-3, atol=1e-4)
        assert found.momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def strided():
    middle = nn.Conv2d(8, 8, 3, 2, 1, groups=8), nn.BatchNorm2d(8), nn.ReLU()
    return nn.Sequential(nn.Conv2d(3, 8, 1), *middle, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(128, 10))


def test_bfloat16_agrees_with_float32(digits, compute):
    half, losses = Compute(device="cpu", precision="bfloat16"), []
    for trained_in in (compute, half):
        model = fresh(strided)
        train(model, digits.fit, Recipe(epochs=2, batch_size=32, lr=0.02), trained_in, seed=0)
        losses += [evaluate(model, digits.holdout, measured_in)["loss"] for measured_in in (compute, half)]
        assert not [module for module in model.modules() if "forward" in vars(module)]  # left as it was
    assert losses == pytest.approx([losses[0]] * 4, rel=0.01)
    assert losses[0] < 2  # it has learned; at larger rates rounding alone leads trainings apart


def test_strided_depthwise_convolutions_train_in_float32(digits):
    """PyTorch is slow at them in bfloat16."""
    model, half, kinds = fresh(strided), Compute(device="cpu", precision="bfloat16"), set()
    for conv in model[:2]:
        conv.register_forward_hook(lambda module, given, out: kinds.add((module.groups, out.dtype)))
    train(model, digits.fit[:64], Recipe(epochs=1, batch_size=32, lr=0.1), half, seed=0)
    assert kinds == {(1, torch.bfloat16), (8, torch.float32)}
