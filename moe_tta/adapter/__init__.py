# SPDX-License-Identifier: Apache-2.0
"""The adapter: gradients with respect to routing, through the served weights."""

from moe_tta.adapter.errors import AdapterError
from moe_tta.adapter.job import RerouteJob, reroute
from moe_tta.adapter.model import AdapterModel
from moe_tta.adapter.neighbours import Neighbour, NeighbourTail, last_row_routing
from moe_tta.adapter.remixing import (
    GradientDescent,
    Line,
    Remixed,
    descend_neighbours,
    search_alpha,
)
from moe_tta.adapter.rerouting import Outcome, Rerouting, Round

__all__ = [
    "AdapterError",
    "AdapterModel",
    "GradientDescent",
    "Line",
    "Neighbour",
    "NeighbourTail",
    "Outcome",
    "Remixed",
    "RerouteJob",
    "Rerouting",
    "Round",
    "descend_neighbours",
    "last_row_routing",
    "reroute",
    "search_alpha",
]
