"""LeGR: efficient model compression via learned global ranking (Chin et al., CVPR 2020)."""

from legr import models
from legr.files import UserError
from legr.graph import Graph
from legr.ranking import Ranking, filter_norms, select, select_uniform
from legr.search import learn_ranking
from legr.surgery import prune
from legr.tracing import trace

__all__ = [
    "Graph",
    "Ranking",
    "UserError",
    "filter_norms",
    "learn_ranking",
    "models",
    "prune",
    "select",
    "select_uniform",
    "trace",
]
