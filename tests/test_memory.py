"""Peak memory: of streamed images only the names grow with the data set."""

import os
import subprocess
import sys
import textwrap

import pytest
from PIL import Image

SCRIPT = textwrap.dedent("""
    import resource, sys
    from pathlib import Path
    import torch
    from experiments.datasets import DataSettings, prepare
    from legr import data, models
    from legr.training import Compute, evaluate

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    prepare(DataSettings(name="imagenet", folder=str(folder), resolution=64, holdout=10), folder, folder / "images")
    images = data.load(folder / "images")
    seen = 0
    for pixels, _ in data.augmented_batches(images.fit, 64, torch.Generator().manual_seed(0), crop="resized"):
        seen += len(pixels)
    for pixels, _ in data.batches(images.test, 64):
        seen += len(pixels)
    print(seen, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
          resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
""")


def peaks(tmp_path, count):
    """Images seen, and peak memory (MiB) of the process and of its largest worker, when `count` are streamed."""
    folder = tmp_path / f"{count}"
    for split, share in (("train", count - 64), ("val", 64)):
        for wnid in ("n01440764", "n02102040"):
            (folder / split / wnid).mkdir(parents=True)
        first = folder / split / "n01440764" / "0.png"
        Image.effect_noise((96, 80), 50).convert("RGB").save(first)
        for i in range(1, share):
            os.link(first, folder / split / ("n01440764", "n02102040")[i % 2] / f"{i}.png")
    # Large blocks are given back when they are freed: glibc keeps some 250 MiB of them in one run and none in another.
    alone = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    ended = subprocess.run([sys.executable, "-c", SCRIPT, folder], capture_output=True, text=True, env=alone)
    assert ended.returncode == 0, ended.stderr
    seen, own, worker = map(int, ended.stdout.split())
    return seen, own / 1024, worker / 1024


@pytest.mark.slow
def test_streaming_needs_no_more_memory_for_more_images(tmp_path):
    _, small, small_worker = peaks(tmp_path, 1_000)
    seen, large, large_worker = peaks(tmp_path, 30_000)
    assert seen > 29_900
    pixels = 30_000 * 3 * 64 * 64 / 2**20  # 351 MiB, were they held
    names = 30_000 * 500 / 2**20  # paths and labels, as Python and NumPy hold them
    assert large - small < names + 60 < pixels / 2  # 60: what the peak varies by
    assert large_worker - small_worker < names + 60
