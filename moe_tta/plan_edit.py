# SPDX-License-Identifier: Apache-2.0
"""What a round changes of the plans that a request brought with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moe_tta.plan import RoutingPlan
from moe_tta.spans import SEGMENTS


@dataclass(frozen=True, eq=False)
class PlanEdit:
    """Fields of a plan that a round has computed.

    `bias` is added to the plan's own; any other field stands instead of the plan's
    own, so that whoever offers one must refuse requests that set both.

    Attributes:
        fields: Arrays by the plan's field names, of the plan's shapes.
        segments: Which of `SEGMENTS` they apply to.
    """

    fields: Mapping[str, np.ndarray]
    segments: tuple[bool, bool, bool] = (True,) * len(SEGMENTS)

    def applied(self, plan: RoutingPlan | None, segment: int) -> RoutingPlan | None:
        """Return a segment's plan with the edit; `None` is the model's own rule.

        Args:
            plan: The request's own.
            segment: Place in `SEGMENTS`.
        """
        if not self.segments[segment]:
            return plan
        fields = dict(plan.arrays()) if plan is not None else {}
        for name, array in self.fields.items():
            added = name == "bias" and name in fields
            fields[name] = fields[name] + array if added else array
        edited = RoutingPlan(**fields).normalised()
        return None if edited.neutral else edited
