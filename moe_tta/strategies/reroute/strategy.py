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
        RequestError: `layers` names one that routes nothing, or the optimiser needs
            gradients where there are none.
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
    if params.optimizer == "spsa":
        own["layers"] = params.layers or known  # no router is seen, so none is chosen
        _, *passes = Rerouting(**own).passes  # nor is there a survey
        return Work("reroute", own, tuple(passes), probes=True)
    if context.adapter is not None and not context.adapter.gradients:
        raise RequestError(
            f"expected 'spsa', got {params.optimizer!r}; this engine takes no "
            "gradients (its operator set adapter.gradients to false)",
            "optimizer",
            params.optimizer,
        )
    if context.adapter is not None:
        own["last_loss"] = context.adapter.last_loss
    return Work("reroute", own, Rerouting(**own).passes, together=True)
