"""Means and differences with 95% intervals."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from torch import Tensor


class Difference(NamedTuple):
    """A difference of two means; without an interval (NaN) where one of them is of a single value."""

    mean: float
    low: float  # of the 95% interval
    high: float
    p: float  # of the test that there is none

    def verdict(self, margin: float) -> str:
        """By docs/verdicts.md: ahead, behind, equal within `margin`, undecided; untested without an interval."""
        if math.isnan(self.low):
            return "untested"
        if self.low > 0:
            return "ahead"
        if self.high < 0:
            return "behind"
        return f"equal within {margin:g}" if -margin <= self.low and self.high <= margin else "undecided"

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" ± {(self.high - self.low) / 2:.2f}"
        return f"{self.mean:+.2f}{interval}".replace("-", "−")


def welch(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Mean of `values` less that of `others`, by Welch's t-test."""
    from scipy.stats import ttest_ind

    mean = float(np.mean(values) - np.mean(others))
    if min(len(values), len(others)) < 2:
        return Difference(mean, math.nan, math.nan, math.nan)
    if np.ptp(values) == np.ptp(others) == 0:
        return Difference(mean, mean, mean, float(mean == 0))
    test = ttest_ind(values, others, equal_var=False)
    return Difference(mean, *map(float, test.confidence_interval(0.95)), float(test.pvalue))


def holm(p: Sequence[float], level: float = 0.05) -> list[bool]:
    """Which of several tests exclude chance at a common level (Holm, 1979)."""
    order, passed = np.argsort(p), [False] * len(p)
    for rank, index in enumerate(order):
        if not p[index] <= level / (len(p) - rank):
            break
        passed[index] = True
    return passed


def interval(values: pd.Series) -> float:
    """Half the width of the mean's 95% interval (Student's t); NaN for a single value."""
    from scipy.stats import sem, t

    return float(t.ppf(0.975, len(values) - 1) * sem(values)) if len(values) > 1 else math.nan


def paired(before: Tensor, after: Tensor) -> tuple[float, float]:
    """How much more of the same images is right `after`, as a fraction, and half of its 95% interval."""
    change = after.double() - before.double()
    return change.mean().item(), 1.96 * change.std().item() / len(change) ** 0.5
