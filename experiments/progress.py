"""One progress line for anything long. The pipeline shows it on the terminal, not in the notebook."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def bar(iterable: Iterable | None = None, **options: Any) -> tqdm:
    """tqdm on stderr, or on the file that LEGR_PROGRESS names."""
    path = os.environ.get("LEGR_PROGRESS")
    file = open(path, "a", encoding="utf-8") if path else sys.stderr  # noqa: SIM115 (lives as long as the bar)
    return tqdm(iterable, file=file, mininterval=1, dynamic_ncols=path is None, ncols=100 if path else None, **options)


class Log:
    """A `log` for `train` and `learn_ranking`: shows the last row's numbers and the time left."""

    def __init__(self, what: str, total: int, *shown: str):
        self.shown, self.started = shown, False
        self.bar = bar(total=total, desc=what)

    def __call__(self, row: dict[str, Any]) -> None:
        number = row.get("evaluation", row.get("epoch"))
        if not self.started:  # work found finished does not count towards the time left
            self.bar.initial = self.bar.n = number - 1
            self.started = True
        self.bar.set_postfix({name: f"{row[name]:.3f}" for name in self.shown if name in row}, refresh=False)
        self.bar.update()
        if number == self.bar.total:
            self.bar.close()
