"""The whole scale on one page that can be read offline: the answer first, then the executed notebooks."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from jinja2 import DictLoader, Environment, FileSystemLoader
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image

from experiments.analysis import claims, comparison_figures, figures
from experiments.analysis.tables import computing_hours, markdown, summary, worded
from experiments.experiment import Experiment
from experiments.methods import METHODS
from legr.files import UserError, write_text

FOLDED = """
{%- extends 'basic/index.html.j2' -%}
{%- block input -%}
<details class="code"><summary>code</summary>{{ super() }}</details>
{%- endblock input -%}
"""
ORDER = (
    "compare",
    "rankings/*",
    "sets/*",
    "ablations",
    "dense",
)  # the answer, how it was made, why, what it starts from


class _Renderer(IPythonRenderer):
    """nbconvert's, but TeX becomes MathML, which browsers draw without a script."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


def build(experiments: list[Experiment], out: Path) -> None:
    """Write index.html, and what only all experiments together give: the figures hero and idea, and the claims.

    answer.md and results.md are the parts of README.md and docs/results.md that hold numbers.

    Raises:
        UserError: an experiment lacks results.
    """
    try:
        _build(experiments, out)
    except FileNotFoundError as error:
        raise UserError(f"results {error.filename} do not exist; run the pipeline (dvc repro)") from None


def _build(experiments: list[Experiment], out: Path) -> None:
    exporter = _exporter()
    chapters, places = {}, {}
    for exp in experiments:
        notebooks = [path for stage in ORDER for path in sorted(exp.folder.glob(f"{stage}/notebook.ipynb"))]
        if not notebooks:
            raise UserError(f"results folder {exp.folder} has no executed notebooks; run the pipeline (dvc repro)")
        chapters[exp.name] = [_chapter(exporter, path, exp.folder) for path in notebooks]
        places |= {(exp.name, part["stage"]): f"{exp.name}-{i}" for i, part in enumerate(chapters[exp.name], 1)}
    out.mkdir(parents=True, exist_ok=True)
    answers, first = claims.claims(experiments), experiments[0]
    titles = {exp.name: exp.title for exp in experiments}
    write_text(out / "claims.csv", answers.to_csv(index=False))
    numbers = [f"## {exp.title}\n\n{markdown(worded(summary(exp.networks)))}" for exp in experiments]
    write_text(out / "results.md", "\n".join(numbers))
    hours = pd.concat({exp.name: computing_hours(exp) for exp in experiments}, names=["experiment"])
    hours.to_csv(out / "compute.csv", float_format="%.4g")
    findings = {exp.name: [claims.finding(exp, method) for method in exp.settings.rankings] for exp in experiments}
    spent = hours.sum(axis=1).groupby("hardware", sort=False).sum()
    took = "; ".join(f"{each:.1f} on {name}" for name, each in spent.items())
    write_text(out / "answer.md", _answer(experiments, findings, answers, took))
    panels = [(exp.title, exp.networks, exp.dense) for exp in experiments]
    about = " | ".join([f"{first.scale} scale", *(f"{exp.title}: {exp.effort}" for exp in experiments)])
    figures.save(comparison_figures.hero(panels, about), out / "hero")
    method = next(name for name in first.methods if METHODS[name].learned)
    target, floor = min(first.settings.rankings[method].targets), first.settings.floor
    ranking = first.ranking(method, 0)
    about = f"{first.about} at {target:.0%} FLOPs · {METHODS[method].label}, first trial"
    about += " · coloured below the cut: the layer is at its floor · logarithmic, but linear around zero"
    figures.save(comparison_figures.idea(first.graph, first.norms, ranking, target, floor, method, about), out / "idea")
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        scale=first.scale,
        digits=first.settings.data.name == "digits",
        titles=titles,
        findings=findings,
        claims=answers.groupby(["claim", "paper"], sort=False),
        places=places,
        hours=hours.assign(total=hours.sum(axis=1)).round(2),
        pictures={name: _embedded((out / f"{name}.png").read_bytes()) for name in ("hero", "idea")},
        cuts=json.dumps({exp.name: _cuts(exp) for exp in experiments}, separators=(",", ":")),
        chapters=chapters,
    )
    write_text(out / "index.html", page)


def _answer(experiments: list[Experiment], findings: dict[str, list[str]], answers: pd.DataFrame, took: str) -> str:
    """What was found, the claims, and which runs they are of, in Markdown."""
    scale, titles = experiments[0].scale, {exp.name: exp.title for exp in experiments}
    lines = [f"- **{titles[name]}:** {sentence}.\n" for name, each in findings.items() for sentence in each]
    runs = ". ".join(f"{exp.title}: {exp.effort.replace(' · ', ', ')}" for exp in experiments)
    table = markdown(claims.linked(answers, titles, f"results/{scale}"))
    return "\n".join(
        ["".join(lines), table, f"`{scale}` scale. {runs}. Hours of computing, summed over processes: {took}.\n"]
    )


def _cuts(exp: Experiment) -> dict[str, Any]:
    """What the page's slider shows of an experiment: all methods' cuts, and the networks that were fine-tuned."""
    methods, table, cuts = {}, exp.networks, exp.cuts
    for name in exp.methods:
        rows = cuts[cuts.method == name]
        tuned = table[table.method == name].groupby("target")[["flops", "accuracy"]].mean()  # over trials
        methods[name] = {
            "label": METHODS[name].label,
            "color": METHODS[name].color,
            "mflops": (rows.flops / 1e6).round(2).tolist(),
            "accuracy": (100 * rows.accuracy_recalibrated).round(2).tolist(),
            "widths": [list(map(int, widths.split())) for widths in rows.widths],
            "tuned": [[round(f / 1e6, 2), round(100 * a, 2)] for f, a in tuned.itertuples(index=False)],
        }
    return {"title": exp.title, "dense": exp.graph.widths, "shares": cuts.share.unique().tolist(), "methods": methods}


def _exporter() -> HTMLExporter:
    """Notebooks as HTML, with folded code."""
    renderer = _Renderer(escape=False, exclude_anchor_links=True)
    return HTMLExporter(
        template_file="folded.html.j2",
        extra_loaders=[DictLoader({"folded.html.j2": FOLDED})],
        exclude_input_prompt=True,
        exclude_output_prompt=True,
        filters={"markdown2html": MarkdownWithMath(renderer=renderer).render},
    )


def _chapter(exporter: HTMLExporter, path: Path, folder: Path) -> dict[str, str]:
    """A notebook's stage, its title (the first line of its first cell) and the rest as HTML, less hints for playing."""
    stage = path.parent.relative_to(folder).as_posix()
    notebook = nbformat.read(path, as_version=4)
    title, _, notebook.cells[0].source = notebook.cells[0].source.removeprefix("# ").partition("\n")
    if "/" in stage:
        title += f": {METHODS[path.parent.name].label}"
    for cell in notebook.cells:
        cell.source = re.sub(r"^> \*\*To play:\*\*.*$", "", cell.source, flags=re.M)
        for output in (output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})):
            output.data["image/png"] = _embedded(base64.b64decode(output.data["image/png"]))
            output.metadata["image/png"] = {"alt": title}
    return {"title": title, "stage": stage, "body": exporter.from_notebook_node(notebook)[0]}


def _embedded(png: bytes) -> str:
    """A picture in base64, with a palette of 256 colours: a third of the size."""
    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256).save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue()).decode()
