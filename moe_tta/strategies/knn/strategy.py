# SPDX-License-Identifier: Apache-2.0
"""The plan of knn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_tta.errors import RequestError
from moe_tta.plan import MAX_RECALLED, RoutingPlan
from moe_tta.remix.serving import ServedTokens
from moe_tta.strategies.base import PlanContext
from moe_tta.strategies.operator_stores import held_layers, store_named

if TYPE_CHECKING:
    from moe_tta.strategies.knn.params import KnnParams


def plan(params: KnnParams, context: PlanContext) -> RoutingPlan:
    """Let every row look its own target and share up in a token memory.

    The look-up itself is `kernels.recall`, in the worker: it needs each row's router
    input.

    Source: kNN-MoE, arXiv 2601.02144.
    Differs: experts are then chosen as the model chooses them, the best top_k of the
    blend; the paper's own blend may have more. `dynamic_k` beside it takes more.

    Raises:
        RequestError: the model has no distribution to blend, or a parameter does not
            fit the model or the store.
    """
    shape = context.shape
    if not shape.is_distribution:
        raise RequestError(
            "needs a softmax router without correction bias; this model scores with "
            f"{shape.scoring}",
            "store",
        )
    served = store_named(params.store, context, ServedTokens)
    most = min(MAX_RECALLED, served.card.counts.tokens)
    if params.k > most:
        raise RequestError(f"expected 1..{most}, got {params.k}", "k", params.k)
    covered = held_layers(params.layers, shape, served.card.layers)
    return RoutingPlan(
        memory=np.where(covered, served.place, 0).astype(np.int32),
        neighbours=np.where(covered, params.k, 0).astype(np.int32),
    )
