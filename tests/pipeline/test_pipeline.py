"""The whole pipeline through DVC, on a shortened demo: what it leaves, what it runs again, and how it fails."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pandas as pd
import psutil
import pytest
from bs4 import BeautifulSoup
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from legr.models import CifarResNet
from tests.conftest import NAME, PROJECT, change, contents, dvc, environment

pytestmark = pytest.mark.xdist_group("pipeline")
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
STAGES = {  # folder: the figures, tables and networks that it must hold
    "dense": ["curves", "training.csv", "dense.json", "network.safetensors"],
    "rankings/legr": ["search", "maps", "widths", "search.gif", "ranking-0.json", "search-0.csv", "record-0.json"],
    "sets/legr": ["widths", "accuracy", "networks.csv", "cuts.csv", "0.5-0.safetensors", "0.5-0.json"],
    "sets/norm": ["widths", "accuracy", "networks.csv", "cuts.csv", "0.5-0.safetensors", "0.5-0.json"],
    "ablations": ["prediction", "answers", "fitness.csv", "searches.csv", "correlations.csv", "ablations.json"],
    "compare": ["accuracy", "latency", "tuning", "cost", "networks", "tradeoff.csv", "metrics.json"],
    "explore": ["images.zip"],
}


def results(folder, name=NAME):
    return folder / "results" / "demo" / name


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_source_notebook_is_clean_and_short(path):
    cells = nbformat.read(path, as_version=4).cells
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in cells) == 1
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
    lines = [line for cell in cells if cell.cell_type == "code" for line in cell.source.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 100
    assert not path.stem[0].isdigit() or len(lines) <= 60


def test_it_leaves_a_folder_for_each_stage(done):
    for stage, expected in STAGES.items():
        for part in ["notebook.ipynb", *expected]:  # of a figure both formats, and the numbers it shows
            for name in [part] if "." in part else [f"{part}.png", f"{part}.csv"]:
                assert (results(done) / stage / name).stat().st_size > 0, (stage, name)
    table = pd.read_csv(results(done) / "compare/tradeoff.csv")
    expected = {"method", "trial", "flops", "params", "accuracy_before", "accuracy_recalibrated", "accuracy", "seconds"}
    assert expected <= set(table.columns) and set(table.method) == {"legr", "norm"}
    assert table.flops_ratio.between(0.35, 0.5).all()
    metrics = json.loads((results(done) / "compare/metrics.json").read_text())
    assert metrics == {"0.5": pytest.approx(table.groupby("method").accuracy.mean().to_dict())}
    latency = pd.read_csv(results(done) / "compare/latency.csv")
    assert len(latency) == 2 * 3 and (latency.latency_ms > 0).all()  # batches; two networks and the dense one
    assert not (done / ".state").exists() or not [p for p in (done / ".state").rglob("*") if p.is_file()]


def test_executed_notebooks_are_clean(done):
    paths = list((done / "results").rglob("notebook.ipynb"))
    assert len(paths) == len(STAGES)
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
        told = [v for o in outputs for k, v in o.get("data", {}).items() if k.startswith("text/")]
        text = "\n".join([cell.source for cell in notebook.cells] + told + [o.get("text", "") for o in outputs])
        text = re.sub(r"base64,[\w+/=]+", "", text)
        for dirt in (str(done), str(PROJECT), str(Path.home()) + "/", "it/s", "Warning", "/tmp/", "dashboard"):
            assert dirt not in text, (path, dirt)
        assert outputs and not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"], path
        assert "papermill" not in path.read_text().replace("import papermill", "")


def test_a_second_run_has_nothing_to_do(done):
    assert "up to date" in dvc(done, "repro")
    assert "up to date" in dvc(done, "status")


def test_metrics_and_plots_show_the_headline(done, tmp_path):
    metrics = json.loads(dvc(done, "metrics", "show", "--json"))[""]["data"]
    assert metrics[f"results/demo/{NAME}/compare/metrics.json"]["data"]["0.5"]["legr"] > 0
    dvc(done, "plots", "show", "--out", str(tmp_path / "plots"))
    page = BeautifulSoup((tmp_path / "plots/index.html").read_text(), "html.parser")
    (shown,) = [img["src"] for img in page("img")]
    assert shown.startswith("data:") or (tmp_path / "plots" / shown).is_file()


SETS = {"set", "set-plain", "compare", "explore", "report"}


@pytest.mark.parametrize(
    ("edit", "stages", "allowed"),
    [
        (lambda d: d["finetune"]["recipe"].update(epochs=3), {"set", "set-plain"}, SETS),
        (lambda d: d["rankings"]["legr"]["search"].update(evaluations=5), {"ranking"}, {"ranking"} | SETS),
        (lambda d: d["latency"].update(repetitions=3), {"compare"}, {"compare", "explore", "report"}),
    ],
)
def test_a_change_runs_what_depends_on_it_alone(done, edit, stages, allowed):
    """By `dvc repro --dry`; what follows is known when the stages before have run."""
    before = (done / "params.yaml").read_text()
    try:
        change(done, lambda params: edit(params["demo"][NAME]))
        lines = dvc(done, "repro", "--dry").splitlines()
    finally:
        (done / "params.yaml").write_text(before)
    found = [line.split("'")[1] for line in lines if line.startswith("Running stage")]
    assert stages <= {stage.split("@")[0] for stage in found} <= allowed


def test_what_only_reads_results_leaves_searches_and_networks_as_they_are(copy):
    for name in ("analysis/claims.py", "analysis/tables.py", "analysis/report.py", "analysis/report.html.j2",
                 "interactive/explorer.py", "interactive/export.py"):  # fmt: skip
        with open(copy / "experiments" / name, "a") as file:
            file.write("\n")
    lines = dvc(copy, "repro", "--dry").splitlines()
    stages = {re.split("'|@", line)[1] for line in lines if line.startswith("Running stage")}
    assert {"compare", "explore"} <= stages and not stages & {"data", "dense", "ranking", "set", "set-plain"}


@pytest.fixture
def copy(done, tmp_path):
    """The finished project to change: without DVC's cache, which nothing is in."""
    return shutil.copytree(done, tmp_path / "project", ignore=shutil.ignore_patterns("__pycache__", "plots"))


def stage(folder, *arguments, env=None):
    command = [sys.executable, "-m", "experiments", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=env or environment(folder))


def test_a_new_target_trains_only_its_own_network(copy):
    """With a comment more in the library, too: a result is not named by the code that made it."""
    norm = results(copy) / "sets/norm"
    before = contents(norm)
    with open(copy / "legr/ranking.py", "a") as file:
        file.write("# a comment\n")
    change(copy, lambda p: p["demo"][NAME]["targets"].append(0.4))
    dvc(copy, "repro", "-s", f"set-plain@demo-{NAME}-norm")
    after = contents(norm)
    for name in ("0.5-0.json", "0.5-0.safetensors"):
        assert after[name] == before[name]  # its record says how many seconds it took: it was not trained again
    records = {f"0.4-{trial}.{suffix}" for trial in (0, 1) for suffix in ("json", "csv")}
    assert records | {"0.4-0.safetensors"} == after.keys() - before.keys()  # the first trial's network is kept
    assert len(pd.read_csv(norm / "networks.csv")) == 2 * 2


def raising(folder):
    path = folder / "notebooks/3_prune.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[-1].source = "1 / 0"
    nbformat.write(notebook, path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (
            lambda folder: change(folder, lambda p: p["demo"][NAME]["finetune"]["recipe"].update(lr=1e30, warmup=0)),
            r"error: lr is 1e\+30; the loss became (nan|inf) in epoch 1, so it must be smaller$",
        ),
        (raising, r"^error: notebook 3_prune failed in cell \d+: ZeroDivisionError: division by zero$"),
    ],
)
def test_a_stage_that_fails_leaves_what_was_there(copy, spoil, sentence):
    before = contents(copy / "results")
    spoil(copy)
    ended = stage(copy, "sets/norm", "demo", NAME)
    assert ended.returncode == 1 and re.search(sentence, ended.stderr.strip().splitlines()[-1])
    assert contents(copy / "results") == before


PLAIN = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_a_stage_runs_this_folders_code_in_this_environments_python(copy):
    """Two checkouts and one environment, in which the other one is installed; kernels as of a hub, which can't start.

    Where no kernel starts at all, what was there stays.
    """
    spec = copy / "jupyter/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/no/such/python", "{connection_file}"], "display_name": "Hub", "language": "python"}')
    models = copy / "legr/models.py"
    models.write_text(models.read_text().replace("CifarResNet(9, num_classes)", "CifarResNet(1, num_classes)"))
    shutil.rmtree(results(copy) / "dense")
    ended = stage(copy, "dense", "demo", NAME, env=PLAIN | {"JUPYTER_PATH": str(copy / "jupyter")})
    assert ended.returncode == 0, ended.stderr
    record = json.loads((results(copy) / "dense/dense.json").read_text())
    assert record["params"] == sum(p.numel() for p in CifarResNet(1).parameters())

    before = contents(copy / "results")
    (copy / "ipykernel_launcher.py").write_text("raise SystemExit(3)")  # comes before the installed one
    ended = stage(copy, "dense", "demo", NAME)
    assert ended.returncode == 1 and contents(copy / "results") == before
    assert ended.stderr.startswith("error: kernel of notebook 1_dense did not start, or ended: "), ended.stderr


def test_a_notebook_that_writes_to_results_refuses_code_from_elsewhere(copy):
    notebook = nbformat.read(copy / "notebooks/1_dense.ipynb", as_version=4)
    notebook.cells[1].source += '\nresults = "results"'
    (copy / "legr/models.py").write_text("")
    before = contents(copy / "results")
    with pytest.raises(CellExecutionError, match="results is 'results', which only the code in .* may write, and legr"):
        NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(copy / "notebooks")}}).execute(
            env=PLAIN
        )
    assert contents(copy / "results") == before


@pytest.mark.slow
def test_a_stage_that_was_killed_goes_on(copy):
    """SIGKILL to runner and kernel while the second network trains: the first is not trained again."""
    change(copy, lambda p: p["demo"][NAME].update(targets=[0.45, 0.4], trials=1))
    change(copy, lambda p: p["demo"][NAME]["finetune"]["recipe"].update(epochs=3, batch_size=64))
    before, state = contents(copy / "results"), copy / ".state" / "results" / "demo" / NAME / "sets/norm"
    command = [sys.executable, "-m", "experiments", "sets/norm", "demo", NAME]
    process = psutil.Popen(command, cwd=copy, env=environment(copy), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while len(list(state.glob("training-*.pt"))) < 2:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    for victim in [*process.children(recursive=True), process]:
        victim.kill()
    process.wait()
    first = (state / "0.45-0.json").read_bytes()
    assert not (state / "0.4-0.json").exists()
    assert contents(copy / "results") == before
    ended = stage(copy, "sets/norm", "demo", NAME)
    assert ended.returncode == 0, ended.stderr
    norm = results(copy) / "sets/norm"
    assert (norm / "0.45-0.json").read_bytes() == first
    assert json.loads((norm / "0.4-0.json").read_text())["epochs"] == 3 and not state.exists()


def test_a_notebook_by_hand_writes_to_the_playground_only(done):
    """As in JupyterLab: current folder notebooks/, the parameters cell edited, `results` as it stands there."""
    notebook = nbformat.read(done / "notebooks/2_ranking.ipynb", as_version=4)
    (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    cell.source = cell.source.replace("overrides = {}", 'overrides = {"rankings.legr.search.evaluations": 5}')
    before, sources = contents(done / "results"), contents(done / "notebooks")
    try:
        client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(done / "notebooks")}})
        client.execute(env=environment(done))
        assert len(pd.read_csv(done / "playground/demo" / NAME / "rankings/legr/search-0.csv")) == 5
        assert contents(done / "results") == before and contents(done / "notebooks") == sources
        assert "up to date" in dvc(done, "status")
    finally:
        shutil.rmtree(done / "playground", ignore_errors=True)
        shutil.rmtree(done / ".state/playground", ignore_errors=True)


def test_explore_by_hand_leaves_no_stage_modified(copy):
    """JupyterLab saves outputs, counts and its kernel into the notebook."""
    path = copy / "notebooks/explore.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell |= {"execution_count": 1, "outputs": [nbformat.v4.new_output("stream", text="shown")]}
    notebook.metadata.language_info.version = "3.11.7"
    nbformat.write(notebook, path)
    assert "up to date" in dvc(copy, "status")


@pytest.mark.slow
def test_a_method_of_ones_own_is_in_every_stage(copy):
    """The row that docs/tweaking.md shows: filters go by chance."""
    text = (PROJECT / "docs/tweaking.md").read_text(encoding="utf-8")
    function, row = re.search(r"^```py\n(.*?)\n\n\n(Method.*?)\n```", text, flags=re.M | re.S).groups()
    path = copy / "experiments/methods.py"
    rows = path.read_text(encoding="utf-8").replace("METHODS = {", f"import torch\n\n\n{function}\n\n\nMETHODS = {{")
    path.write_text(rows.replace('Method("norm",', f'{row},\n        Method("norm",'), encoding="utf-8")
    change(copy, lambda params: params["methods"]["plain"].append("chance"))
    dvc(copy, "repro")
    assert "chance" in set(pd.read_csv(results(copy) / "compare/tradeoff.csv").method)
    assert "by chance" in (copy / "results/demo/report/index.html").read_text(encoding="utf-8")
    code = f"""if True:
        import torch
        from experiments.experiment import open_experiment
        from experiments.interactive.explorer import Explorer
        exp = open_experiment("demo", "{NAME}", "explore")
        explorer = Explorer(exp, "chance", 0.5)
        assert all(map(torch.equal, explorer.shown.kept, exp.select("chance", 0.5)))
        assert not all(map(torch.equal, explorer.shown.kept, exp.select("norm", 0.5)))
    """
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, env=environment(copy), capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
