"""Figures: each draws what the demo has not, whose figures the pipeline's tests draw."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from experiments.analysis import comparison_figures, figures
from tests.conftest import random_kept


def tradeoff():
    rows = [(method, target, trial) for method in ("legr", "norm") for target in (0.7, 0.3) for trial in range(3)]
    table = pd.DataFrame(rows, columns=["method", "target", "trial"])
    table = table.assign(flops=1e8 * table.target, accuracy=0.9 - 0.01 * table.trial, accuracy_recalibrated=0.5)
    cuts = pd.DataFrame({"method": "legr", "flops": [3e7, 1e8], "accuracy_recalibrated": [0.4, 0.9]})
    return figures.tradeoff(table, cuts, {"flops": 1e8, "accuracy": 0.93}, PAPERS, "a caption")


PAPERS = pd.DataFrame({"network": ["LeGR"], "mflops": [58.9], "accuracy_percent": [93.7], "source": ["paper"]})
POINTS = pd.DataFrame({"category": ["70%", "47%"] * 2, "method": ["legr"] * 2 + ["uniform"] * 2, "value": [1, 2, 1, 1]})
POINTS = POINTS.assign(star=POINTS.value == 2)
VERDICTS = [*comparison_figures.VERDICTS, "equal within 0.5"]
CLAIMS = pd.DataFrame({"claim": [f"claim {v}" for v in VERDICTS], "experiment": "one", "verdict": VERDICTS})
CLAIMS["number"] = "+0.1 ± 0.2"
DRAWN = {
    "weights as they are": lambda: figures.training(pd.DataFrame([{"epoch": 0, "val_accuracy": 0.9}]), "a caption"),
    "tradeoff of three trials": tradeoff,
    "hero": lambda: comparison_figures.hero({"A network\nis ahead": POINTS}, "a caption"),
    "tiles": lambda: comparison_figures.tiles(CLAIMS, {"one": "A network"}, "a caption"),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_every_figure_is_drawn_and_carries_its_numbers(tmp_path, draw):
    figure = draw()
    shown = figures.save(figure, tmp_path / "figure")
    assert shown.data == (tmp_path / "figure.png").read_bytes()
    assert figure._supxlabel.get_text() == "a caption"
    with Image.open(tmp_path / "figure.png") as image:
        assert np.asarray(image.convert("L")).std() > 5  # not a blank page
    assert len(pd.read_csv(tmp_path / "figure.csv")) == len(figure.data) > 0


def test_widths_and_the_movie_show_what_is_kept(small, tmp_path):
    _, graph = small
    kept = {f"{m} at 50%": random_kept(graph, i) for i, m in enumerate(("legr", "norm"))}
    figure = figures.widths(graph, kept, "a caption")
    figures.save(figure, tmp_path / "widths")
    assert [ax.get_title("left").split(" · ")[0] for ax in figure.axes][1] == "norm-only at 50%"
    widths = {name: [int(mask.sum()) for mask in masks] for name, masks in kept.items()}
    assert pd.read_csv(tmp_path / "widths.csv")[list(kept)].to_dict("list") == widths
    for evaluations, frames in ((8, 3), (1, 5)):
        tried = [widths["legr at 50%"]] * (evaluations - 1) + [widths["norm at 50%"]]
        losses = pd.DataFrame({"evaluation": range(1, evaluations + 1), "loss": 2.0, "best": 2.0})
        html = figures.search_movie(graph, tried, losses, "legr", tmp_path / "search", frames)
        assert html.startswith("<img") and "base64," in html
        with Image.open(tmp_path / "search.gif") as movie:
            assert movie.n_frames == min(frames, evaluations)
