"""The methods that are compared: one row each. A method's name in params.yaml puts it into the pipeline."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

import legr


@dataclass(frozen=True)
class Method:
    """How a method chooses filters, and how it looks in figures.

    `learned`: params.yaml says under `rankings` how its ranking is learned; without one α is 1 and κ 0 everywhere.
    `uniform`: every layer loses the same fraction.
    `keep`: layers whose output nothing activates stay whole (`Graph.unactivated`), and so in its search.
    `importance`: what Eq. 1 scales and shifts, one tensor [width] per layer, made from squared filter norms of the
    same shapes; as it is here, those norms.
    """

    name: str
    label: str
    color: str  # of Okabe and Ito's palette, distinct for colour-blind readers
    marker: str
    learned: bool = False
    uniform: bool = False
    keep: bool = False
    importance: Callable[[Sequence[Tensor]], Sequence[Tensor]] = list

    def kept_layers(self, graph: legr.Graph) -> Collection[str]:
        """Names of layers that stay whole."""
        return graph.unactivated if self.keep else ()

    def select(
        self, graph: legr.Graph, norms: list[Tensor], ranking: legr.Ranking | None, target: float, floor: float
    ) -> list[Tensor]:
        """Masks at the fraction `target` of the FLOPs. Without a ranking filters compete by their importance alone."""
        keep, importance = self.kept_layers(graph), self.importance(norms)
        if self.uniform:
            return legr.select_uniform(graph, importance, target, floor=floor, keep=keep)
        ranking = ranking or legr.Ranking.norm_only(len(norms))
        return legr.select(graph, ranking.scores(importance), target, floor=floor, keep=keep)


METHODS = {
    method.name: method
    for method in (
        Method("legr", "LeGR", "#0072B2", "o", learned=True),
        Method("legr-ours", "LeGR, ours", "#56B4E9", "v", learned=True, keep=True),
        Method("norm", "norm-only", "#D55E00", "s"),
        Method("norm-kept", "norm-only + rule", "#E69F00", "D", keep=True),
        Method("uniform", "uniform", "#009E73", "^", uniform=True),
    )
}
DENSE, PAPER = "#000000", "#7F7F7F"  # colours of the dense network, and of the paper's numbers
