# SPDX-License-Identifier: Apache-2.0
"""The plan of remix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_tta.errors import RequestError
from moe_tta.plan import RoutingPlan
from moe_tta.remix import updates
from moe_tta.remix.lookup import MAX_NEIGHBOURS
from moe_tta.remix.serving import ServedStore
from moe_tta.strategies.base import PlanContext, as_ranges
from moe_tta.strategies.operator_stores import store_named
from moe_tta.strategies.remix.neighbours import borrow, covered_layers, from_vector

if TYPE_CHECKING:
    from moe_tta.shape import RouterShape
    from moe_tta.strategies.remix.params import RemixParams

SUM_ERROR = 1e-3  # what plans accept


def check(params: RemixParams, context: PlanContext) -> None:
    """Refuse what no prompt could make right.

    Raises:
        RequestError: the model has no distribution to replace, or a parameter does
            not fit the model or the store.
    """
    if not context.shape.is_distribution:
        raise RequestError(
            "needs a softmax router without correction bias; this model scores with "
            f"{context.shape.scoring}",
            "store" if params.store is not None else "distribution",
        )
    if params.distribution is not None:
        _given(params, context.shape)
        return
    served = store_named(params.store, context, ServedStore)
    if params.update == "mode":
        raise RequestError(
            "mode finding needs the request's own pathway, which is known only once "
            "its prompt was read; find it offline (moe_tta.remix.updates.mean_shift) "
            "and send the distribution",
            "update",
            params.update,
        )
    if params.in_rounds() and context.adapter and not context.adapter.gradients:
        raise RequestError(
            f"expected 'kernel_regression', got {params.update!r}; this engine takes "
            "no gradients (its operator set adapter.gradients to false)",
            "update",
            params.update,
        )
    most = min(MAX_NEIGHBOURS, len(served.store))
    if params.k is not None and params.k > most:
        raise RequestError(f"expected 1..{most}, got {params.k}", "k", params.k)
    covered_layers(params, context)
    if params.vector is not None:
        from_vector(params, served)
    elif served.embedder is None:
        raise RequestError(
            "is missing: this store's embeddings are the model's hidden states, which "
            "are not known before the prompt is read",
            "vector",
        )


def plan(params: RemixParams, context: PlanContext) -> RoutingPlan:
    """Blend the neighbours' mean pathway into the routing distribution.

    Source: C3PO, arXiv 2504.07964, kernel regression; with `confidence` the share of
    kNN-MoE, arXiv 2601.02144.
    Differs: the own distribution is blended in each layer as the router gives it after
    the edits of the layers before, not taken from an unedited run; with alpha 0 there
    is no difference. All experts are borrowed, not the 20 best.
    """
    check(params, context)
    if params.distribution is not None:
        target = _given(params, context.shape)
        return _blend(target, 1.0 - (params.alpha or 0.0))
    # what is searched for on the neighbours' loss comes from the worker, by `rounds`
    found = None if params.in_rounds() else borrow(params, context)
    if found is None:
        return RoutingPlan()
    layers = covered_layers(params, context)
    covered = np.isin(context.shape.layers, layers)
    target = np.zeros((len(covered), context.shape.num_experts), np.float32)
    target[covered] = updates.regress(found)
    share = 1.0 - (params.alpha or 0.0)
    if params.confidence:
        share = updates.confidence(found.similarities)
    return _blend(target, share)


def _blend(target: np.ndarray, share: float) -> RoutingPlan:
    """Return the plan that gives `target` [L, E] a share in the rows it fills."""
    filled = target.any(axis=1)
    return RoutingPlan(
        target=target, mix=np.where(filled, share, 0.0).astype(np.float32)
    )


def _given(params: RemixParams, shape: RouterShape) -> np.ndarray:
    """Return the request's own distributions [L, E], 0 in layers without one."""
    target = np.zeros((len(shape.layers), shape.num_experts), np.float32)
    for layer, numbers in params.distribution.items():
        path = f"distribution.{layer}"
        if layer not in shape.layers:
            raise RequestError(
                f"expected an MoE layer of this model ({as_ranges(shape.layers)}), "
                f"got {layer}",
                path,
                layer,
            )
        if len(numbers) != shape.num_experts:
            raise RequestError(
                f"expected {shape.num_experts} numbers, got {len(numbers)}", path
            )
        if min(numbers) < 0 or abs(sum(numbers) - 1) > SUM_ERROR:
            raise RequestError("expected numbers >= 0 that sum to 1", path)
        target[shape.layers.index(layer)] = numbers
    return target
