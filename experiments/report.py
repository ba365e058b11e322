"""All executed notebooks of one scale as a single page that can be read offline: no script, no link to fetch."""

import base64
import io
import json
import re
import subprocess
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path

import nbformat
from jinja2 import DictLoader, Environment
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from PIL import Image

from experiments.config import Workspace
from legr.errors import UserError
from legr.files import write_text

BODY = """
{%- extends 'basic/index.html.j2' -%}
{%- block input -%}
<details class="code"><summary>code</summary>{{ super() }}</details>
{%- endblock input -%}
"""


def build(spaces: list[Workspace], path: Path) -> None:
    """Write the page for experiments of one scale.

    Raises:
        UserError: if an experiment has no executed notebooks.
    """
    exporter = HTMLExporter(
        template_file="body.html.j2",
        extra_loaders=[DictLoader({"body.html.j2": BODY})],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    experiments = []
    for space in spaces:
        folder = space.results / "notebooks"
        chapters = [
            {"id": f"{space.name}-{stem}", "folded": folded, **_chapter(exporter, folder / f"{stem}.ipynb")}
            for stem, folded in _stems(space)
            if (folder / f"{stem}.ipynb").exists()
        ]
        if not chapters:
            raise UserError(f"results folder {space.results} has no executed notebooks; run the pipeline (dvc repro)")
        experiments.append({"name": space.name, "facts": _facts(space), "chapters": chapters})
    template = files("experiments").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template).render(scale=spaces[0].scale, experiments=experiments)
    write_text(path, page)


def _stems(space: Workspace) -> list[tuple[str, bool]]:
    """The plan's executed notebooks in reading order, and whether each is a folded detail."""
    rankings = [(f"2_ranking-{method}", False) for method in space.settings.search.rankings]
    networks = [(f"3_prune-{method}-{target}", True) for method, target in space.networks]
    return [("1_baseline", False), *rankings, *networks, ("4_fitness", False), ("5_compare", False)]


def _chapter(exporter: HTMLExporter, source: Path) -> dict[str, str]:
    notebook = nbformat.read(source, as_version=4)
    title = source.stem
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _mathml(re.sub(r"^> \*\*To play:\*\*.*$", "", cell.source, flags=re.M))
            if heading := re.match(r"# (.+)\n?", cell.source):
                title = heading[1]
                cell.source = cell.source[heading.end() :]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    detail = source.stem.partition("-")[2]
    body, _ = exporter.from_notebook_node(notebook)
    return {"title": f"{title} ({detail})" if detail else title, "body": body}


def _smaller(png: str) -> str:
    """A figure, base64, with a palette of 128 colours: a third of the size."""
    out = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as image:
        image.convert("RGB").quantize(128).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()


def _mathml(markdown: str) -> str:
    """TeX between dollars as MathML, which browsers draw without a script. Code spans are left alone."""
    parts = re.split(r"(`+[^`]*`+)", markdown)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"\$\$(.+?)\$\$", lambda m: convert(m[1].strip(), "block"), parts[i], flags=re.S)
        parts[i] = re.sub(r"\$(.+?)\$", lambda m: convert(m[1]), parts[i])
    return "".join(parts)


def _facts(space: Workspace) -> dict[str, str]:
    """Where the numbers come from."""
    dense = json.loads((space.results / "baseline.json").read_text(encoding="utf-8"))
    settings = space.settings
    seeds = [str(settings.baseline.seed), str(settings.search.algorithm.seed)]
    return {
        "scale": space.scale,
        "data": f"{settings.data.name}, {dense['train_images']:,} images for the dense network, "
        f"{dense['test_images']:,} for testing",
        "network": settings.model,
        "seeds": f"baseline {seeds[0]}, search {seeds[1]}, fine-tuning {', '.join(map(str, settings.finetune.seeds))}",
        "hardware": f"{dense['hardware']}; {dense['device']}, {dense['threads']} threads, {dense['precision']}",
        "PyTorch": dense["torch"],
        "time": f"{dense['seconds']:,.0f} seconds for the dense network (wall time, pauses included); "
        "the searches' times are in the chapters on the ranking",
        "page made": f"{datetime.now(UTC):%Y-%m-%d} from {_commit(space.root)}",
    }


def _commit(root: Path) -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout

    try:
        commit = git("rev-parse", "--short=12", "HEAD").strip()
        changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=no").splitlines()]
    except (OSError, subprocess.CalledProcessError):
        return "not in a git repository"
    changed = [name for name in changed if not name.startswith(("results/", "dvc.lock"))]
    return f"commit {commit}" + (f", with changes in {', '.join(changed)}" if changed else "")
