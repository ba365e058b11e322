"""Races: which of several candidates has the lowest loss, found on no more images than that takes.

The races of Maron and Moore (1994), on the differences between two candidates' losses on the same images.
"""

import base64
import math
from collections.abc import Callable, Iterable
from statistics import NormalDist
from typing import Any

import numpy as np

FIRST = 128  # images that every candidate sees; then twice as many, and so on up to all


class Race:
    """Losses of candidates on the first images of a fixed, shuffled set, and comparisons between them.

    A candidate is out once its mean loss lies above the leader's, on the n of N images that both have seen, by
    more than z standard errors of their paired differences, s · sqrt(1/n - 1/N). One comparison errs with
    probability 1 - Φ(z) where the mean is normally distributed, and never when all images are seen. z is such
    that of `comparisons` of them at all looks any errs with probability `error` at most (Bonferroni).

    Args:
        images: N.
        error: in (0, 1).
        comparisons: how many pairs of candidates are compared in all, at most.
        see: called with a list of candidates and a number of images; it has to tell the losses up to there.
    """

    def __init__(self, images: int, error: float, comparisons: int, see: Callable[[list[int], int], None]):
        self.images, self.see = images, see
        self.looks = [FIRST]
        while self.looks[-1] * 2 < images:
            self.looks.append(self.looks[-1] * 2)
        self.looks = [*(look for look in self.looks if look < images), images]
        self.z = NormalDist().inv_cdf(1 - error / (comparisons * len(self.looks)))
        self.losses: dict[int, np.ndarray] = {}
        self.contenders: list[int] = []  # those that may have the lowest loss of all told

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

    def enter(self, candidate: int) -> int:
        """A contender more; those that are out by what has been seen leave. The one in front.

        No image is seen for it: whether any two differ matters only when the lowest of all is asked for.
        """
        self.contenders.append(candidate)
        leader = min(self.contenders, key=self.loss)
        self.contenders = [c for c in self.contenders if c == leader or not self._worse(c, leader)]
        return leader

    def finish(self, candidate: int) -> None:
        """Have it see all images."""
        if self.seen(candidate) < self.images:
            self.see([candidate], self.images)

    def keep(self, candidates: Iterable[int]) -> None:
        """Forget all others that are no contenders."""
        self.losses = {c: self.losses[c] for c in sorted({*candidates, *self.contenders})}

    def state(self) -> dict[str, Any]:
        losses = {str(c): base64.b64encode(losses.tobytes()).decode() for c, losses in self.losses.items()}
        return {"losses": losses, "contenders": self.contenders}

    def restore(self, state: dict[str, Any]) -> None:
        losses = state["losses"].items()
        self.losses = {int(c): np.frombuffer(base64.b64decode(text), np.float32) for c, text in losses}
        self.contenders = state["contenders"]

    def _worse(self, candidate: int, leader: int) -> bool:
        n = min(self.seen(candidate), self.seen(leader))
        if n == self.images:  # the means themselves decide; of equals neither is worse
            return self.loss(candidate) > self.loss(leader)
        difference = self.losses[candidate][:n].astype(np.float64) - self.losses[leader][:n]
        return difference.mean() > self.z * difference.std(ddof=1) * math.sqrt(1 / n - 1 / self.images)
