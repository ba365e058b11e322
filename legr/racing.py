"""Races: which of several candidates has the lowest loss, found on no more images than that takes.

The races of Maron and Moore (1994), on the differences between two candidates' losses on the same images.
"""

import base64
import math
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import Any

import numpy as np

FIRST = 128  # images that every candidate sees; then 192, 256, 384, 512, 768 and so on up to all


class Race:
    """Losses of candidates on the first images of a fixed, shuffled set, and comparisons between them.

    A candidate is out once its mean loss lies above the leader's, on the n of N images that both have seen, by
    more than z standard errors of their paired differences, about s · sqrt(1/n - 1/N). The images are strata by their
    classes, which the networks that are compared prefer differently: s is the deviation within a class, pooled
    (Cochran, Sampling Techniques, 1977, ch. 5; one stratum while a class has been seen less than twice). One comparison
    errs with probability 1 - Φ(z) where the mean is normally distributed, and never when all images are seen. z is such
    that of `comparisons` of them at every look any errs with probability `error` at most (Bonferroni).

    Args:
        labels: the images' classes [N], in an order in which the first n are much like all.
        error: in (0, 1).
        comparisons: how many pairs of candidates are compared in all, at most.
        see: called with a list of candidates and a number of images; it has to tell the losses up to there.
    """

    def __init__(self, labels: np.ndarray, error: float, comparisons: int, see: Callable[[list[int], int], None]):
        self.images, self.see = len(labels), see
        self.labels = np.unique(labels, return_inverse=True)[1]
        doubled = [FIRST * 2**k for k in range(max(self.images // FIRST, 1).bit_length())]
        looks = sorted([*doubled, *(n * 3 // 2 for n in doubled)])
        self.looks = [*(n for n in looks if n < self.images), self.images]
        self.z = NormalDist().inv_cdf(1 - error / (comparisons * max(len(self.looks) - 1, 1)))  # the last can't err
        self.losses: dict[int, np.ndarray] = {}

    def tell(self, candidate: int, losses: np.ndarray) -> None:
        """The losses on images that follow those seen so far; what is not finite counts as very large."""
        large = np.finfo(np.float32).max / 2
        finite = np.nan_to_num(np.asarray(losses, np.float32), nan=large, posinf=large)
        self.losses[candidate] = np.concatenate([self.losses.get(candidate, finite[:0]), finite])

    def seen(self, candidate: int) -> int:
        return len(self.losses[candidate])

    def loss(self, candidate: int) -> float:
        """Its mean over the images seen."""
        return float(self.losses[candidate].mean(dtype=np.float64))

    def lowest(self, candidates: Iterable[int]) -> int:
        """The candidate with the lowest loss on all images; of equals the first."""
        alive = list(dict.fromkeys(candidates))
        while len(alive) > 1:
            leader = min(alive, key=self.loss)
            alive = [c for c in alive if c == leader or not self._worse(c, leader)]
            fewest = min(map(self.seen, alive))
            if fewest == self.images:
                return min(alive, key=self.loss)
            if len(alive) > 1:
                self.see([c for c in alive if self.seen(c) == fewest], min(n for n in self.looks if n > fewest))
        return alive[0]

    def finish(self, candidate: int) -> None:
        """Have it see all images."""
        if self.seen(candidate) < self.images:
            self.see([candidate], self.images)

    def state(self) -> dict[str, str]:
        return {str(c): base64.b64encode(losses.tobytes()).decode() for c, losses in self.losses.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self.losses = {int(c): np.frombuffer(base64.b64decode(text), np.float32) for c, text in state.items()}

    def _worse(self, candidate: int, leader: int) -> bool:
        n = min(self.seen(candidate), self.seen(leader))
        if n == self.images:  # the means themselves decide; of equals neither is worse
            return self.loss(candidate) > self.loss(leader)
        difference = self.losses[candidate][:n].astype(np.float64) - self.losses[leader][:n]
        labels, all_labels = self.labels[:n], self.labels
        if np.bincount(labels, minlength=all_labels.max() + 1).min() < 2:
            labels, all_labels = np.zeros(n, int), np.zeros(self.images, int)
        seen, there = np.bincount(labels), np.bincount(all_labels)
        means = np.bincount(labels, difference) / seen
        variance = ((difference - means[labels]) ** 2).sum() / (n - len(seen))
        share = there / self.images
        return share @ means > self.z * math.sqrt(variance * (share**2 * (1 / seen - 1 / there)).sum())
