"""The executed notebooks of one scale as a single page that can be read offline: no script, no link to fetch."""

import re
from pathlib import Path

import nbformat
from jinja2 import DictLoader, Template
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from legr.files import UserError, write_text

FOLDED = """
{%- extends 'basic/index.html.j2' -%}
{%- block input -%}
<details class="code"><summary>code</summary>{{ super() }}</details>
{%- endblock input -%}
"""
ORDER = ("compare", "dense", "rankings/*", "sets/*", "ablations")  # the answer first


class _Renderer(IPythonRenderer):
    """nbconvert's, but TeX becomes MathML, which browsers draw without a script."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


def build(results: Path, names: list[str]) -> None:
    """Write `results`/report.html from the experiments' executed notebooks.

    Raises:
        UserError: an experiment has none.
    """
    renderer = _Renderer(escape=False, exclude_anchor_links=True)
    exporter = HTMLExporter(
        template_file="folded.html.j2",
        extra_loaders=[DictLoader({"folded.html.j2": FOLDED})],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"markdown2html": MarkdownWithMath(renderer=renderer).render},
    )
    experiments = {}
    for name in names:
        found = [path for stage in ORDER for path in sorted((results / name).glob(f"{stage}/notebook.ipynb"))]
        if not found:
            raise UserError(f"results folder {results / name} has no executed notebooks; run the pipeline (dvc repro)")
        experiments[name] = [_chapter(exporter, path) for path in found]
    template = Path(__file__).with_name("report.html.j2").read_text(encoding="utf-8")
    page = Template(template, autoescape=True).render(scale=results.name, experiments=experiments)
    write_text(results / "report.html", page)


def _chapter(exporter: HTMLExporter, path: Path) -> dict[str, str]:
    """A notebook's title, the first line of its first cell, and the rest as HTML, without hints for playing."""
    notebook = nbformat.read(path, as_version=4)
    title, _, notebook.cells[0].source = notebook.cells[0].source.removeprefix("# ").partition("\n")
    if path.parent.parent.name in ("rankings", "sets"):
        title += f" ({path.parent.name})"
    for cell in notebook.cells:
        cell.source = re.sub(r"^> \*\*To play:\*\*.*$", "", cell.source, flags=re.M)
    return {"title": title, "body": exporter.from_notebook_node(notebook)[0]}
