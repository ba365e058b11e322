"""Photographs: folders named by WordNet ids, streaming from disk, weights trained elsewhere, several processes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import legr
from experiments import pretrained
from experiments.config import workspace
from experiments.datasets import DataSettings, prepare
from legr import data, models
from legr.depthwise import fast_backward
from legr.training import Recipe, evaluate, train
from tests.conftest import PROJECT, change

WNIDS = ["n01440764", "n02102040", "n03888257"]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Photographs of several sizes and formats, train/<wnid>/ and val/<wnid>/."""
    root, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for label, wnid in enumerate(WNIDS):
            (root / split / wnid).mkdir(parents=True)
            for i in range(count):
                height, width = random.integers(40, 80, 2)
                pixels = random.integers(0, 120, (height, width, 3)) + np.eye(3, dtype=int)[label] * 100
                image = Image.fromarray(pixels.astype(np.uint8))
                image = image.convert("L") if i == 0 else image  # some photographs have no colour
                image.save(root / split / wnid / f"{wnid}_{i}.{'png' if i % 2 else 'jpg'}")
    return root


def prepared(tree, path, **settings):
    prepare(DataSettings(holdout=6, resolution=32, folder=str(tree), **settings), path.parent, path)
    return data.load(path)


@pytest.fixture
def both(tree, tmp_path):
    """The same photographs in memory and streamed."""
    return prepared(tree, tmp_path / "memory", name="imagenette"), prepared(tree, tmp_path / "disk", name="imagenet")


def test_streaming_shows_what_memory_holds(both):
    memory, disk = both
    assert isinstance(disk.fit, data.Files) and isinstance(memory.fit, data.Images)
    for part in ("fit", "holdout", "test", "train"):
        here, there = getattr(memory, part), getattr(disk, part)
        assert len(here) == len(there) > 0
        assert torch.equal(there.load().pixels, here.pixels)
        assert torch.equal(there.labels, here.labels)
    for crop in ("pad", "resized"):
        epochs = [
            list(data.augmented_batches(d.fit, 8, torch.Generator().manual_seed(3), crop=crop)) for d in (memory, disk)
        ]
        for (x, y), (u, v) in zip(*epochs, strict=True):
            assert torch.equal(y, v)
            # A resized crop starts from the file when streamed, from the square in memory.
            assert x.shape == u.shape and (crop == "resized" or torch.equal(x, u))


def test_streamed_epochs_repeat_by_their_seed(both):
    _, disk = both

    def epoch(seed):
        return torch.cat(
            [x for x, _ in data.augmented_batches(disk.fit, 8, torch.Generator().manual_seed(seed), crop="resized")]
        )

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))


def test_a_streamed_set_trains_and_is_searched(both, compute):
    """The same code as in memory: training, evaluation, and a fitness that decodes its few images once."""
    from legr.fitness import Fitness, FitnessSettings

    memory, disk = both
    results = []
    for images in (memory, disk):
        model = models.build("mobilenet_v2", 3, 0)
        train(model, images.fit, Recipe(epochs=1, batch_size=8, lr=0.01), compute, seed=0)
        graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
        settings = FitnessSettings(kind="recalibrated", recalibration_images=16)
        judge = Fitness(model, graph, images, 0.5, settings, compute)
        ranking = legr.Ranking.norm_only(len(graph.layers))
        results.append([evaluate(model, images.test, compute)["loss"], judge(ranking)["loss"]])
        assert isinstance(judge.validation, data.Images)
    assert results[0] == results[1]


def test_rescaling_brings_layers_to_one_scale_and_changes_no_output(compute):
    from experiments.pretrained import rescale

    model = models.build("mobilenet_v2", 3, 0).eval()
    image = torch.randn(2, 3, 64, 64)
    expected = model(image)
    with torch.no_grad():  # as deployment tools leave it: each layer at a scale of its own
        for factor, block in enumerate(model.features[1:-1], 2):
            conv, norm = block.conv[-2], block.conv[-1]
            conv.weight *= factor
            norm.running_mean *= factor
            norm.running_var.copy_((norm.running_var + norm.eps) * factor**2 - norm.eps)
    rescale(model)
    convolutions = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    medians = torch.stack([c.weight.flatten(1).norm(dim=1).median() for c in convolutions])
    torch.testing.assert_close(medians, torch.ones(52))
    torch.testing.assert_close(model(image), expected, rtol=1e-3, atol=1e-4)


def test_photographs_keep_their_proportions(tmp_path):
    wide = Image.new("RGB", (90, 30), "white")
    wide.paste("black", (30, 0, 60, 30))
    assert (data.cut(wide, 30) == 0).all()  # the centre square, not the whole squashed
    corner = data.cut(wide, 30, (1 / 3, 1.0, 0.0, 0.0))
    assert (corner == 255).all()  # the left third


def test_an_unreadable_image_is_named_and_counted(tree, tmp_path):
    import shutil

    for name in ("imagenette", "imagenet"):
        copy = shutil.copytree(tree, tmp_path / name)
        for i in (1, 2):
            next((copy / "train" / WNIDS[i]).glob("*_3.png")).write_bytes(b"not an image")
        with pytest.raises(legr.UserError, match=r"2 unreadable images, the first of them: .*n02102040_3\.png"):
            prepared(copy, tmp_path / "out", name=name)
        assert not (tmp_path / "out").exists()


def test_an_image_that_breaks_off_is_named_when_it_is_streamed(tree, tmp_path):
    import shutil

    copy = shutil.copytree(tree, tmp_path / "copy")
    broken = next((copy / "train" / WNIDS[0]).glob("*_3.png"))
    broken.write_bytes(broken.read_bytes()[:600])  # its header is whole
    images = prepared(copy, tmp_path / "out", name="imagenet")
    with pytest.raises(legr.UserError, match=r"^image .*n01440764_3\.png can't be read"):
        images.train.load()


@pytest.mark.parametrize(
    ("folder", "message"),
    [("cat", "class folder 'cat' is not a WordNet id"), ("n00000001", "'n00000001' is not one of ImageNet's 1,000")],
)
def test_a_folder_that_is_no_imagenet_class_is_one_sentence(tree, tmp_path, folder, message):
    import shutil

    copy = shutil.copytree(tree, tmp_path / "copy")
    for split in ("train", "val"):
        (copy / split / WNIDS[0]).rename(copy / split / folder)
    with pytest.raises(legr.UserError, match=message):
        prepared(copy, tmp_path / "out", name="imagenette")
    assert not (tmp_path / "out").exists()


def test_imagenet_without_a_folder_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.delenv("LEGR_IMAGENET", raising=False)
    with pytest.raises(legr.UserError, match="data.folder is missing"):
        prepare(DataSettings(name="imagenet", holdout=1), tmp_path, tmp_path / "out")


def test_a_resolution_too_small_for_the_network_is_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    change(tmp_path, lambda p: p["laptop"]["imagenet-mobilenetv2"]["data"].update(resolution=16))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(legr.UserError, match=r"data\.resolution is 16; mobilenet_v2 needs at least 32 pixels"):
        workspace("laptop", "imagenet-mobilenetv2")


@pytest.fixture(scope="module")
def thousand():
    """A 1,000-class MobileNetV2."""
    return models.build("mobilenet_v2", 1000, 1)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_keep_just_the_rows_of_the_classes(thousand, tmp_path, suffix):
    path = tmp_path / f"weights.{suffix}"
    state = {k: v.half() if v.is_floating_point() else v for k, v in thousand.state_dict().items()}
    (save_file if suffix == "safetensors" else lambda s, p: torch.save(s, p))(state, path)
    model = models.build("mobilenet_v2", 3, 0)
    said = pretrained.start(model, "mobilenet_v2", str(path), WNIDS, tmp_path)
    assert said["weights"] == path.name and len(said["weights_sha256"]) == 64
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = thousand.eval()(x)[:, [0, 217, 701]]  # sorted WordNet ids are ImageNet's order
        assert torch.allclose(model.eval()(x), expected, atol=2e-2)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_fine_tuning_has_no_dropout():
    torch.manual_seed(0)
    model = models.build("mobilenet_v2", 10, 0).train()
    features = torch.ones(4, 1280)
    assert torch.equal(model.classifier(features), model.classifier(features))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda s: s.pop("features.0.0.weight"), "belongs to another network: tensor 'features.0.0.weight' is absent"),
        (lambda s: s.update(extra=torch.zeros(1)), r"tensor 'extra' is \[1\] there and must be absent"),
        (
            lambda s: s.update({"classifier.1.weight": torch.zeros(7, 1280)}),
            r"tensor 'classifier.1.weight' is \[7, 1280\] there and must be \[3, 1280\]",
        ),
        (lambda s: s["features.0.0.weight"].fill_(float("nan")), "holds values that are not finite"),
    ],
)
def test_weights_of_another_network_are_one_sentence(tmp_path, spoil, message):
    state = {k: v.clone() for k, v in models.build("mobilenet_v2", 3, 0).state_dict().items()}
    spoil(state)
    save_file(state, tmp_path / "weights.safetensors")
    with pytest.raises(legr.UserError, match=message):
        models.load_weights(models.build("mobilenet_v2", 3, 1), tmp_path / "weights.safetensors", [0, 1, 2])


def test_a_pickle_is_never_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"features.0.0.weight": Evil()}, tmp_path / "weights.pth")
    with pytest.raises(legr.UserError, match="not a whole state dict"):
        models.load_weights(models.build("mobilenet_v2", 3, 1), tmp_path / "weights.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("channels", "side", "kernel", "stride", "padding"),
    [(8, 9, 3, 2, 1), (5, 8, 5, 2, 2), (6, 11, 3, 3, 0), (7, 8, 3, (1, 2), 1)],
)
def test_the_faster_backward_pass_has_the_same_gradients(channels, side, kernel, stride, padding):
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(channels, channels, kernel, stride, padding, groups=channels, bias=False).double()
    x = torch.randn(2, channels, side, side, dtype=torch.double, requires_grad=True)

    def gradients():
        out = conv(x)
        return out, *torch.autograd.grad(out.square().sum(), (x, conv.weight))

    expected = gradients()
    with fast_backward(torch.nn.Sequential(conv)):
        assert "forward" in vars(conv)
        found = gradients()
    assert torch.equal(found[0], expected[0])
    assert all(torch.allclose(f, e) for f, e in zip(found, expected, strict=True))
    assert "forward" not in vars(conv)


WORKER = """
import json, sys, torch
from legr import data, distributed, models
from legr.training import Compute, Recipe, evaluate, train
distributed.join()
torch.set_num_threads(1)
images = data.load(sys.argv[1])
torch.manual_seed(0)
model = models.CifarResNet(1)  # rounding grows slowly in a shallow network
compute = Compute(device="cpu", precision="float32").resolve()
history = train(model, images.fit.first(128), Recipe(epochs=2, batch_size=32, lr=0.02), compute, seed=5,
                validation=images.holdout.first(65), state_folder=sys.argv[2])
if distributed.share()[0] == 0:
    weight = model.linear.weight.sum().item()
    print(json.dumps([distributed.share()[1], weight, history.drop(columns="seconds").values.tolist()]))
distributed.leave()
"""


def test_two_processes_train_as_one_does(tmp_path):
    """Under torchrun: the same losses, accuracies and weights within rounding, and the state that one resumes from."""
    (tmp_path / "worker.py").write_text(WORKER)
    # Noise: over the digits' even background rounding flips whole regions of ReLU at once.
    pixels = torch.randint(0, 256, (260, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = data.Images(pixels, torch.arange(260) % 10)
    data.save(tmp_path / "noise", "noise", list("0123456789"), noise, noise.first(10), 65, 0)
    path = {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    found = []
    for launch in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]):
        command = [sys.executable, *launch, "worker.py", "noise", f"state{len(launch)}"]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | path)
        assert result.returncode == 0, result.stderr
        found.append(json.loads(result.stdout.splitlines()[-1]))
    (one, weight, rows), (two, weight_of_two, rows_of_two) = found
    assert (one, two) == (1, 2)
    assert np.allclose(rows, rows_of_two, atol=1e-3)
    assert weight == pytest.approx(weight_of_two, abs=1e-3)
    names = [{p.name for p in (tmp_path / f"state{n}").iterdir()} for n in (0, 5)]
    assert names[0] == names[1] and len(names[0]) == 1


def test_a_batch_that_can_not_be_shared_is_one_sentence(monkeypatch):
    from legr import distributed

    monkeypatch.setattr(distributed, "share", lambda: (0, 3))
    with pytest.raises(legr.UserError, match="batch_size is 128; it must be a multiple of 3"):
        distributed.check_batch_size(128)


def test_paper_scale_reads_any_imagenet_tree(tree, tmp_path, monkeypatch):
    """The `paper` section's data settings, but for its size, on a tree laid out as ILSVRC2012."""
    (tmp_path / "params.yaml").write_text((PROJECT / "params.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    settings = workspace("paper", "imagenet-mobilenetv2").settings
    assert (settings.data.name, settings.data.resolution, settings.finetune.recipe.crop) == ("imagenet", 224, "resized")
    monkeypatch.setenv("LEGR_IMAGENET", str(tree))
    prepare(settings.data.model_copy(update={"holdout": 6}), tmp_path, tmp_path / "out")
    images = data.load(tmp_path / "out")
    assert isinstance(images.fit, data.Files) and images.fit.side == 224
    batch, labels = next(data.batches(images.test, 4))
    assert batch.shape == (4, 3, 224, 224) and labels.tolist() == [0, 0, 0, 1]
