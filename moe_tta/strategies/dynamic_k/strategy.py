# SPDX-License-Identifier: Apache-2.0
"""The plan of dynamic_k."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_tta.errors import RequestError, show
from moe_tta.plan import NUM_SELECT_ARGS, RoutingPlan, Select
from moe_tta.strategies.base import PlanContext, layers_in

if TYPE_CHECKING:
    from moe_tta.strategies.dynamic_k.params import DynamicKParams


def plan(params: DynamicKParams, context: PlanContext) -> RoutingPlan:
    """Select the first k experts, the one of a rank, or as many as carry the mass p.

    Source: Harder Tasks Need More Experts (arXiv 2403.07652), section 2; a fixed k
    as in Dynamic Experts Search (arXiv 2509.22572); a rank as in SCMoE's weak rows
    (arXiv 2405.14507).
    Differs: weights follow the request's `renorm` instead of staying raw, and p is
    bounded by k_min and k_max.
    """
    shape = context.shape
    covered = layers_in(shape, params.layers)
    if params.k is not None:
        _check_count(params.k, "k", shape.k_max)
        if params.k == shape.top_k:
            return RoutingPlan()
        return _select(covered, Select.TOP_K, params.k, params.k, 0.0)
    if params.rank is not None:
        if params.rank > shape.num_experts:
            raise RequestError(
                f"expected 1..{shape.num_experts}, got {show(params.rank)}",
                "rank",
                params.rank,
            )
        return _select(covered, Select.RANKS, 1, 1, params.rank - 1)
    k_max = shape.k_max if params.k_max is None else params.k_max
    _check_count(k_max, "k_max", shape.k_max)
    k_min = 1 if params.k_min is None else params.k_min
    if k_min > k_max:
        raise RequestError(
            f"expected k_min <= k_max = {k_max}, got {show(k_min)}", "k_min", k_min
        )
    return _select(covered, Select.TOP_P, k_min, k_max, params.p)


def _check_count(count: int, parameter: str, k_max: int) -> None:
    if count > k_max:
        raise RequestError(
            f"expected 1..{k_max}, got {show(count)}; this engine was built for at "
            f"most {k_max} experts per token (the operator can raise the engine "
            "option k_max)",
            parameter,
            count,
        )


def _select(
    covered: np.ndarray, select: Select, k_min: int, k_max: int, argument: float
) -> RoutingPlan:
    """Fill the selection fields where `covered` [L] is true."""
    args = np.zeros((len(covered), NUM_SELECT_ARGS), np.float32)
    args[covered, 0] = argument
    return RoutingPlan(
        select=np.where(covered, int(select), int(Select.MODEL)).astype(np.int32),
        k_min=np.where(covered, k_min, 1).astype(np.int32),
        k_max=np.where(covered, k_max, 0).astype(np.int32),
        select_args=args,
    )
