# SPDX-License-Identifier: Apache-2.0
"""reroute: better expert choices from the request's own text, while it runs."""

from moe_tta.strategies.reroute.params import RerouteParams
from moe_tta.strategies.reroute.strategy import work
from moe_tta.strategies.rounds import RoundStrategy

REROUTE = RoundStrategy("reroute", RerouteParams, work)
