# SPDX-License-Identifier: Apache-2.0
"""The rounds of reroute."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_tta.errors import RequestError
from moe_tta.rounds import Work
from moe_tta.strategies.base import PlanContext, as_ranges
from moe_tta.strategies.rounds import RoundParams

if TYPE_CHECKING:
    from moe_tta.strategies.reroute.params import RerouteParams


def work(params: RerouteParams, context: PlanContext) -> Work:
    """Say what a round does: `moe_tta.adapter.Rerouting` by its fields.

    Raises:
        RequestError: `layers` names one that routes nothing.
    """
    from moe_tta.adapter.rerouting import Rerouting  # imports transformers

    known = context.shape.layers
    for place, layer in enumerate(params.layers or ()):
        if layer not in known:
            raise RequestError(
                f"expected MoE layers ({as_ranges(known)}), got {layer}",
                f"layers[{place}]",
                layer,
            )
    own = params.model_dump(exclude=set(RoundParams.model_fields))
    # spsa draws its directions for a whole batch: a request's would depend on others
    together = params.optimizer != "spsa"
    return Work("reroute", own, Rerouting(**own).passes, together=together)
