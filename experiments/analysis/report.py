"""The whole scale on one page that can be read offline: the answer first, then the executed notebooks."""

import base64
import json
import re
from pathlib import Path
from textwrap import fill
from typing import Any

import nbformat
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from experiments.analysis import claims, comparison_figures, figures, verdicts
from experiments.analysis.tables import accuracies, computing_hours, distinct, markdown
from experiments.experiment import Experiment
from experiments.methods import METHODS
from legr.files import UserError, write_text

ORDER = ("compare", "rankings/*", "ablations", "dense")  # the answer, how it was made, why, what it starts from


class _Renderer(IPythonRenderer):
    """nbconvert's, but TeX becomes MathML, which browsers draw without a script."""

    def block_math(self, body: str) -> str:
        return convert(body, display="block")

    def inline_math(self, body: str) -> str:
        return convert(body)


def build(experiments: list[Experiment], out: Path) -> None:
    """Write index.html, and what only all experiments together give: the figures hero, idea and tiles, and the claims.

    answer.md and results.md are the parts of README.md and docs/results.md that hold numbers.

    Raises:
        UserError: an experiment lacks results.
    """
    try:
        _build(experiments, out)
    except FileNotFoundError as error:
        raise UserError(f"results {error.filename} do not exist; run the pipeline (dvc repro)") from None


def _build(experiments: list[Experiment], out: Path) -> None:
    exporter, chapters, places = _exporter(), {}, {}
    for exp in experiments:
        notebooks = [path for stage in ORDER for path in sorted(exp.folder.glob(f"{stage}/notebook.ipynb"))]
        if not notebooks:
            raise UserError(f"results folder {exp.folder} has no executed notebooks; run the pipeline (dvc repro)")
        chapters[exp.name] = [_chapter(exporter, path, exp.folder) for path in notebooks]
        places |= {(exp.name, chapter["stage"]): f"{exp.name}-{i}" for i, chapter in enumerate(chapters[exp.name], 1)}
    out.mkdir(parents=True, exist_ok=True)
    answers, titles = claims.claims(experiments), {exp.name: exp.title for exp in experiments}
    answers.to_csv(out / "claims.csv", index=False)
    hours = pd.concat({exp.name: computing_hours(exp) for exp in experiments}, names=["experiment"])
    hours.to_csv(out / "compute.csv", float_format="%.4g")
    opening = verdicts.opening(experiments)
    write_text(out / "answer.md", verdicts.in_bullets(*opening) + "\n")
    results = "\n".join(_results(exp, answers) for exp in experiments)
    write_text(out / "results.md", _runs(experiments, hours) + results)
    pictures = _draw(experiments, answers, out)
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html.j2").render(
        scale=experiments[0].scale,
        digits=experiments[0].settings.data.name == "digits",
        titles=titles,
        opening=opening,
        claims=answers.groupby(["claim", "paper"], sort=False),
        places=places,
        hours=hours.assign(total=hours.sum(axis=1)).round(2),
        pictures=pictures,
        cuts=json.dumps({exp.name: _cuts(exp) for exp in reversed(experiments)}, separators=(",", ":")),
        chapters=chapters,
    )
    write_text(out / "index.html", page)


def _runs(experiments: list[Experiment], hours: pd.DataFrame) -> str:
    """Which runs the numbers are of, and what they took."""
    runs = ". ".join(f"{exp.title}: {exp.effort.replace(' · ', ', ')}" for exp in experiments)
    spent = hours.sum(axis=1).groupby("hardware", sort=False).sum()
    took = "; ".join(f"{each:.1f} on {name}" for name, each in spent.items())
    stars = "*: differs at this FLOP count, by Holm's correction over the paper's; without it no difference is claimed"
    return f"`{experiments[0].scale}` scale. {runs}. Hours of computing, summed over processes: {took}. {stars}.\n\n"


def _results(exp: Experiment, answers: pd.DataFrame) -> str:
    """Three tables of an experiment, in Markdown: methods compared, accuracy at every FLOP count, claims."""
    judged, table = verdicts.comparisons(exp), accuracies(exp.networks)
    claimed = answers.loc[answers.experiment == exp.name, ["claim", "paper", "verdict", "evidence"]]
    machines = distinct(exp.networks).groupby(["hardware", "method"], sort=False).size().groupby("hardware", sort=False)
    trained = [
        f"on {hardware}: {'; '.join(f'{count} of {METHODS[name].label}' for (_, name), count in counts.items())}"
        for hardware, counts in machines
    ]
    return "\n".join(
        [
            f"## {exp.title}\n",
            f"Networks trained {'. Networks trained '.join(trained)}. Those that methods share are counted once.\n",
            markdown(judged),
            f"Test accuracy by FLOPs left; the dense network has {exp.dense['accuracy']:.2%}.\n",
            markdown(table),
            markdown(claimed.rename(columns={"evidence": "numbers"}).set_index("claim")),
        ]
    )


def _draw(experiments: list[Experiment], answers: pd.DataFrame, out: Path) -> dict[str, str]:
    """Draw hero, tiles and idea; returned as base64."""
    panels = {f"{exp.title}\n{fill(verdicts.headline(exp), 54)}": verdicts.over_norm_only(exp) for exp in experiments}
    about = " | ".join([f"{experiments[0].scale} scale", *(f"{exp.title}: {exp.effort}" for exp in experiments)])
    stars = "dots: trials, bars: means, *: differs from norm-only (Holm); FLOP counts below the paper's are not judged"
    stars += "; the panels' axes differ"
    figures.save(comparison_figures.hero(panels, f"{about} | {stars}"), out / "hero")
    networks = {exp.name: verdicts.short_title(exp) for exp in experiments}
    runs = " | ".join(f"{networks[exp.name]} {exp.effort}" for exp in experiments)
    numbers = "± numbers: points of test accuracy, mean over the paper's FLOP counts, 95% interval"
    words = "partly: less than claimed, or at some batch sizes; untested: these runs can't decide it"
    about = f"{experiments[0].scale} scale | {runs} | {numbers} | {words}"
    figures.save(comparison_figures.tiles(answers, networks, about), out / "tiles")
    exp = experiments[-1]
    method = next(name for name in exp.methods if METHODS[name].learned)
    target = min(exp.settings.rankings[method].targets)
    about = f"{exp.about} at {target:.0%} FLOPs · {METHODS[method].label}, first trial · block outputs are left out"
    about += " · coloured below the cut: the layer is at its floor; filters that go together are one dot"
    ranking = exp.ranking(method, 0)
    figure = comparison_figures.idea(exp.graph, exp.norms, ranking, target, exp.settings.floor, method, about)
    figures.save(figure, out / "idea")
    return {name: base64.b64encode((out / f"{name}.png").read_bytes()).decode() for name in ("hero", "idea")}


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
            "tuned": [[target, round(f / 1e6, 2), round(100 * a, 2)] for target, f, a in tuned.itertuples()],
        }
    return {"title": exp.title, "dense": exp.graph.widths, "shares": cuts.share.unique().tolist(), "methods": methods}


def _exporter() -> HTMLExporter:
    """Notebooks as HTML, without their code, to which each chapter has a link."""
    renderer = _Renderer(escape=False, exclude_anchor_links=True)
    return HTMLExporter(
        template_name="basic",
        exclude_input=True,
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
    return {"title": title, "stage": stage, "body": exporter.from_notebook_node(notebook)[0]}
