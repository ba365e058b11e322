"""The examples and commands that the pages print, run in the order in which they stand there."""

import re
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.conftest import NAME, PHOTOS, PIPELINE, PROJECT, change, copy_project, environment


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), flags=re.M | re.S)


PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
SLOW = re.compile("latency|export")  # takes a minute
EXAMPLES = [
    pytest.param(page, number, id=f"{page.stem}-{number}", marks=[pytest.mark.slow] if SLOW.search(code) else [])
    for page in PAGES
    for number, code in enumerate(blocks(page, "python"))
]


@pytest.mark.parametrize(("page", "number"), EXAMPLES)
def test_an_example_runs(tmp_path, page, number):
    """In a folder that has the committed results and nothing else."""
    script, code = tmp_path / "example.py", blocks(page, "python")[number]
    script.write_text(code, encoding="utf-8")
    (tmp_path / "results").symlink_to(PROJECT / "results")
    result = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.splitlines()) >= 3 or "print" not in code
    if page.name == "README.md":
        assert result.stdout == blocks(page, "text")[number]
    assert {path.name for path in tmp_path.iterdir()} == {"example.py", "results"}


def shell(folder, commands):
    own = {"PAGER": "cat", "GIT_CONFIG_COUNT": "2", "GIT_CONFIG_KEY_0": "user.name", "GIT_CONFIG_VALUE_0": "Reader"}
    own |= {"GIT_CONFIG_KEY_1": "user.email", "GIT_CONFIG_VALUE_1": "reader@example.org"}
    command, own = ["bash", "-euo", "pipefail", "-c", commands], environment(folder) | own
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=own)
    assert result.returncode == 0, commands + result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
def test_the_commands_for_a_network_of_your_own_work(tmp_path):
    copy_project(tmp_path, "legr", "experiments", "notebooks", "params.yaml")
    make, check = blocks(PROJECT / "docs/library.md", "sh")
    shell(tmp_path, make)
    assert "</table>" in (tmp_path / "playground/your_model.ipynb").read_text()
    told = shell(tmp_path, check).splitlines()
    networks = {line.partition(":")[0] for line in told}
    assert {"dense", "norm-0.4", "legr-ours-0.6"} <= networks


@pytest.mark.parametrize("scale", ["demo", "paper"])
def test_an_experiment_of_dvc_can_be_tried_at_every_scale(tmp_path, scale):
    """Dry, in a project whose stages have run; what they left is not looked at."""
    copy_project(tmp_path, *PIPELINE, ".dvc/config")
    methods = yaml.safe_load((tmp_path / "params.yaml").read_text())["methods"]
    stages = ["dense", "ablations", "compare", "explore", *(f"rankings/{method}" for method in methods["learned"])]
    stages += [f"sets/{method}" for method in methods["learned"] + methods["plain"]]
    for file in [f"data/{scale}/{name}.pt" for name in (NAME, PHOTOS)] + [
        f"results/{scale}/{name}/{stage}/file" for name in (NAME, PHOTOS) for stage in stages
    ]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(file)
    shell(tmp_path, "git init -q; git add -A; git commit -q -m Project")
    told = shell(tmp_path, f"dvc exp run --dry -S scale={scale} -S {scale}.{NAME}.finetune.recipe.epochs=3")
    assert f"Running stage 'set@{scale}-{NAME}-legr'" in told and "Running stage 'report'" in told


@pytest.mark.slow
@pytest.mark.xdist_group("pipeline")
def test_the_commands_for_tweaking_work(done, tmp_path):
    folder = tmp_path / "clone"
    shutil.copytree(done, folder, ignore=shutil.ignore_patterns(".dvc", "playground", "plots", "__pycache__"))
    copy_project(folder, ".gitignore", ".dvcignore", ".dvc/config")
    (folder / ".dvc/.gitignore").write_text("/experiment.local\n/tmp\n/cache\n")
    shell(folder, "git init -q; git add -A; git reset -q results dvc.lock; git commit -q -m Project")

    begin, preview, experiment = blocks(PROJECT / "docs/tweaking.md", "sh")
    shell(folder, begin)
    assert f"results/demo/{NAME}/compare/tradeoff.csv" in shell(folder, "git ls-files results")
    change(folder, lambda p: p["demo"][NAME]["finetune"]["recipe"].update(epochs=3))
    told = shell(folder, preview)
    assert "finetune.recipe" in told
    assert f"Running stage 'set@demo-{NAME}-legr'" in told and "Running stage 'ranking" not in told
    told = shell(folder, experiment)
    assert "longer" in told and "longer" in shell(folder, "dvc exp list --name-only")
    assert (folder / "dvc_plots/index.html").stat().st_size > 1000
