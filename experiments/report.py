"""The executed notebooks of one scale as a single page that can be read offline: no script, no link to fetch."""

import base64
import io
import re
from importlib.resources import files
from pathlib import Path

import nbformat
from jinja2 import DictLoader, Environment
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from PIL import Image

from legr.files import UserError, write_text

FOLDED = """
{%- extends 'basic/index.html.j2' -%}
{%- block input -%}
<details class="code"><summary>code</summary>{{ super() }}</details>
{%- endblock input -%}
"""
ORDER = ("compare", "dense", "rankings/*", "sets/*", "ablations")  # the answer first


def build(results: Path, names: list[str]) -> None:
    """Write `results`/report.html from the experiments' executed notebooks.

    Raises:
        UserError: an experiment has none.
    """
    exporter = HTMLExporter(
        template_file="folded.html.j2",
        extra_loaders=[DictLoader({"folded.html.j2": FOLDED})],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
    )
    experiments = []
    for name in names:
        found = [path for stage in ORDER for path in sorted((results / name).glob(f"{stage}/notebook.ipynb"))]
        if not found:
            raise UserError(f"results folder {results / name} has no executed notebooks; run the pipeline (dvc repro)")
        experiments.append({"name": name, "chapters": [_chapter(exporter, results / name, path) for path in found]})
    template = files("experiments").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template).render(scale=results.name, experiments=experiments)
    write_text(results / "report.html", page)


def _chapter(exporter: HTMLExporter, folder: Path, path: Path) -> dict[str, str]:
    notebook, stage = nbformat.read(path, as_version=4), str(path.parent.relative_to(folder))
    title = stage
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = _mathml(re.sub(r"^> \*\*To play:\*\*.*$", "", cell.source, flags=re.M))
            if heading := re.match(r"# (.+)\n?", cell.source):
                title = heading[1] + (f" ({stage.partition('/')[2]})" if "/" in stage else "")
                cell.source = cell.source[heading.end() :]
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _smaller(output.data["image/png"])
    body, _ = exporter.from_notebook_node(notebook)
    return {"id": f"{folder.name}-{stage.replace('/', '-')}", "title": title, "body": body}


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
