"""The methods that are compared: one row each. A method's name in params.yaml puts it into the pipeline."""

from dataclasses import dataclass

from torch import Tensor

import legr


@dataclass(frozen=True)
class Method:
    """How a method looks in figures. `learned`: params.yaml says under `rankings` how its ranking is learned."""

    name: str
    label: str
    color: str  # of Okabe and Ito's palette, distinct for colour-blind readers
    marker: str
    learned: bool = False

    def select(
        self, graph: legr.Graph, norms: list[Tensor], ranking: legr.Ranking | None, target: float, floor: float
    ) -> list[Tensor]:
        """Masks at the fraction `target` of the FLOPs; `ranking` is that of a learned method."""
        if self.name == "uniform":
            return legr.select_uniform(graph, norms, target, floor=floor)
        ranking = ranking if self.learned else legr.Ranking.norm_only(len(norms))
        return legr.select(graph, ranking.scores(norms), target, floor=floor)


METHODS = {
    method.name: method
    for method in (
        Method("legr", "LeGR (the paper's fitness)", "#0072B2", "o", learned=True),
        Method("legr-ours", "LeGR (our fitness)", "#56B4E9", "v", learned=True),
        Method("norm", "norm-only", "#D55E00", "s"),
        Method("uniform", "uniform", "#009E73", "^"),
    )
}
DENSE, PAPER = "#000000", "#7F7F7F"  # colours of the dense network, and of the paper's numbers
