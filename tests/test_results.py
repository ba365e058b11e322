"""Committed results: they are what dvc.lock records, and the README says what they say."""

import hashlib
import json
import re
import subprocess

import pandas as pd
import pytest
import torch
import yaml
from safetensors.numpy import load_file

import legr
from experiments.config import workspace
from experiments.figures import LABELS
from tests.conftest import NAME, PHOTOS, PROJECT


def recorded():
    """(file, MD5) of every output in dvc.lock that git keeps."""
    stages = yaml.safe_load((PROJECT / "dvc.lock").read_text())["stages"]
    outputs = {out["path"]: out["md5"] for stage in stages.values() for out in stage.get("outs", [])}
    too_large = f"results/laptop/{PHOTOS}/baseline.safetensors"  # 9 MB: not in git
    kept = {path for path in outputs if path.startswith("results/") and "/demo/" not in path} - {too_large}
    return {path: outputs[path] for path in kept}


def test_committed_results_are_what_the_pipeline_recorded():
    outputs = recorded()
    assert len(outputs) > 60
    wrong = [p for p, md5 in outputs.items() if hashlib.md5((PROJECT / p).read_bytes()).hexdigest() != md5]
    assert not wrong


def test_every_committed_result_was_made_by_the_pipeline():
    listed = subprocess.run(["git", "ls-files", "results"], cwd=PROJECT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:
        pytest.skip("not in a git repository")
    made = {path for path in listed.stdout.split() if not path.startswith("results/benchmarks/")}  # by make bench
    assert made <= recorded().keys()


@pytest.mark.parametrize(("name", "epochs"), [(NAME, 5), (PHOTOS, 5)])
def test_all_networks_of_the_plan_are_there(name, epochs):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(PROJECT)
        space = workspace("laptop", name)
    table = pd.read_csv(space.results / "tradeoff.csv")
    expected = {(*network, seed) for network in space.networks for seed in space.settings.finetune.seeds}
    assert set(zip(table.method, table.target, table.seed, strict=True)) == expected
    assert (table.flops_ratio < table.target).all()
    assert (table.epochs >= epochs).all()


@pytest.mark.parametrize(("name", "title"), [(NAME, "Results: CIFAR-10"), (PHOTOS, "Results: Imagenette")])
def test_the_readme_says_what_was_measured(name, title):
    """Means over the seeds, in the section of that title."""
    results = PROJECT / "results" / "laptop" / name
    sections = re.split("^## ", (PROJECT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    (text,) = [section for section in sections if section.startswith(title)]
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    said = {(row[0], row[1]): row[2:6] for row in rows if len(row) >= 6}
    table = pd.read_csv(results / "tradeoff.csv").groupby(["method", "target"]).mean(numeric_only=True).reset_index()
    for row in table.itertuples():
        percents = [f"{100 * x:.2f}" for x in (row.accuracy_before, row.accuracy_recalibrated, row.accuracy)]
        assert said[LABELS[row.method], f"{row.target:.0%}"] == [f"{row.flops / 1e6:.1f}", *percents]
    assert f"{100 * json.loads((results / 'baseline.json').read_text())['accuracy']:.2f}" in text
    for row in pd.read_csv(results / "correlations.csv").itertuples():
        assert f"{row.spearman:.2f}".replace("-", "−") in text


def test_the_readme_says_what_the_benchmarks_measured():
    results = PROJECT / "results" / "benchmarks"
    sections = re.split("^## ", (PROJECT / "README.md").read_text(encoding="utf-8"), flags=re.M)
    (text,) = [" ".join(section.split()) for section in sections if section.startswith("Speed")]
    speed = pd.read_csv(results / "speed.csv")
    for row in speed[speed.what.str.startswith("choosing")].itertuples():
        assert f"{1000 * row.ours_s:.1f} ms" in text and f"{row.times_faster:.0f}" in text, row.what
    for what, part in speed.dropna(subset="precision").groupby("what"):
        cells = [f"{part.yardstick_s.iloc[0]:.1f} s ({part.yardstick_kept_s.iloc[0]:.1f} s)"]
        for row in part.sort_values("precision").itertuples():
            cells += [f"{row.ours_s:.1f} s", f"{row.times_faster:.2f} ({row.times_faster_kept:.2f})"]
        assert f"| {' | '.join(cells)} |" in text, what
    searches = pd.read_csv(results / "searches.csv")
    for _, part in searches.groupby("procedure"):
        assert f"{', '.join(f'{seconds:.0f}' for seconds in part.seconds)} s" in text
    for name in ("plain", "racing"):
        times = searches[searches.procedure == name].times_faster
        assert ", ".join(f"{times_faster:.2f}" for times_faster in times) in text
    raced = searches[searches.procedure == "racing"]
    assert (raced.same_candidates == 1).all() == ("through the same 48 candidates" in text)
    assert "{:.0%}, {:.0%} and {:.0%} of the images".format(*raced.images_seen) in text
    shares = [f"{share:.3f}" for share in raced.share_of_yardstick]
    assert "{}, {} and {} of the authors' time".format(*shares) in text
    latency = pd.read_csv(results / "latency.csv")
    sizes = ["batch", "threads"]
    dense = latency[latency.method == "dense"].set_index(["runtime", *sizes]).latency_ms
    legr = latency[(latency.method == "legr") & (latency.target == 0.47)]
    ratios = legr.set_index(["runtime", *sizes, "round_to"]).latency_ratio
    for runtime in latency.runtime.unique():
        cells = []
        for size in ((1, 1), (1, 2), (128, 2)):
            cells += [
                f"{dense[runtime, *size]:.1f} ms",
                *(f"{ratios[runtime, *size, step]:.2f}" for step in (1, 8, 16)),
            ]
        assert f"| {runtime} | {' | '.join(cells)} |" in text
    fastest = legr.groupby(sizes).latency_ms.min() / dense.groupby(sizes).min()
    said = "one image takes {:.2f} of the fastest dense network's time on one thread, {:.2f} on two, and a batch of 128"
    assert f"{said} takes {{:.2f}}.".format(*fastest) in text
    for row in pd.read_csv(results / "torch-pruning.csv").itertuples():
        cells = [row.as_cut, row.recalibrated, row.fine_tuned]
        cells = [f"{row.seconds_to_cut:.1f}", f"{row.flops_ratio:.1%}", *(f"{100 * cell:.2f}" for cell in cells)]
        assert " | ".join([*cells, f"{row.latency_ratio_1:.2f}, {row.latency_ratio_128:.2f}"]) in text, row.method


def test_the_readme_says_how_often_a_network_came_again():
    results = PROJECT / "results" / "laptop" / NAME
    model = legr.models.load_weights(legr.models.resnet56(), results / "baseline.safetensors")
    graph = legr.trace(model, torch.zeros(1, 3, 32, 32))
    norms, again = legr.filter_norms(model, graph), []
    for name in ("candidates", "candidates-tau0"):
        maps = load_file(results / f"{name}.safetensors")
        rankings = [legr.Ranking(tuple(a), tuple(k)) for a, k in zip(maps["scale"], maps["shift"], strict=True)]
        networks = {torch.cat(legr.select(graph, r.scores(norms), 0.47)).numpy().tobytes() for r in rankings}
        again.append(len(rankings) - len(networks))
    text = " ".join((PROJECT / "README.md").read_text(encoding="utf-8").split())
    assert "of the 400 candidates of each of the two committed searches, {} and {} were".format(*again) in text


def test_what_the_readme_links_to_exists():
    pages = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")), PROJECT / "data" / "README.md"]
    for page in pages:
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), (page.name, target)
