# SPDX-License-Identifier: Apache-2.0
"""The adapter: gradients with respect to routing, through the served weights."""

from moe_tta.adapter.errors import AdapterError
from moe_tta.adapter.model import AdapterModel
from moe_tta.adapter.rerouting import Outcome, Rerouting, Round, reroute

__all__ = [
    "AdapterError",
    "AdapterModel",
    "Outcome",
    "Rerouting",
    "Round",
    "reroute",
]
