# SPDX-License-Identifier: Apache-2.0
"""The plan of remix."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_tta.errors import RequestError
from moe_tta.plan import RoutingPlan
from moe_tta.remix import updates
from moe_tta.remix.embed import unit
from moe_tta.remix.errors import StoreError
from moe_tta.remix.lookup import (
    DEFAULT_K,
    MAX_NEIGHBOURS,
    LookUp,
    find_neighbours,
    read_pathways,
)
from moe_tta.remix.serving import ServedStore
from moe_tta.strategies.base import PlanContext, as_ranges
from moe_tta.strategies.operator_stores import held_layers, store_named

if TYPE_CHECKING:
    from moe_tta.shape import RouterShape
    from moe_tta.strategies.remix.params import RemixParams

LAST_LAYERS = 5  # C3PO, arXiv 2504.07964: the last five MoE layers
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
    most = min(MAX_NEIGHBOURS, len(served.store))
    if params.k is not None and params.k > most:
        raise RequestError(f"expected 1..{most}, got {params.k}", "k", params.k)
    _covered(params, context.shape, served)
    if params.vector is not None:
        _from_vector(params, served)
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
    served = store_named(params.store, context, ServedStore)
    query = _query(params, served, context)
    covered = _covered(params, context.shape, served)
    layers = [n for n, ours in zip(context.shape.layers, covered, strict=True) if ours]
    try:
        found = find_neighbours(served.store, query, look_up(params))
        if found is None:
            return RoutingPlan()
        found = read_pathways(served.store, found, layers)
    except StoreError as err:
        raise RequestError(str(err), "store", params.store) from err
    target = np.zeros((len(covered), context.shape.num_experts), np.float32)
    target[covered] = updates.regress(found)
    share = 1.0 - (params.alpha or 0.0)
    if params.confidence:
        share = updates.confidence(found.similarities)
    return _blend(target, share)


def look_up(params: RemixParams) -> LookUp:
    """Return the look-up that the parameters ask for."""
    k = params.k or (DEFAULT_K if params.radius is None else MAX_NEIGHBOURS)
    return LookUp(
        k=k,
        radius=params.radius,
        kernel=params.kernel,
        bandwidth=params.bandwidth,
        floor=params.floor,
        ceiling=params.ceiling,
    )


def _blend(target: np.ndarray, share: float) -> RoutingPlan:
    """Return the plan that gives `target` [L, E] a share in the rows it fills."""
    filled = target.any(axis=1)
    return RoutingPlan(
        target=target, mix=np.where(filled, share, 0.0).astype(np.float32)
    )


def _covered(
    params: RemixParams, shape: RouterShape, served: ServedStore
) -> np.ndarray:
    """Return bool [L]: the layers to change, all held by the store."""
    covered = held_layers(params.layers, shape, served.store.card.layers)
    if params.layers is None:
        covered &= np.cumsum(covered[::-1])[::-1] <= LAST_LAYERS
    return covered


def _query(
    params: RemixParams, served: ServedStore, context: PlanContext
) -> np.ndarray:
    """Return the query's unit embedding [D] float32."""
    if params.vector is not None:
        return _from_vector(params, served)
    if params.query is not None:
        return served.query(params.query)
    try:
        text = context.prompt.text
    except RequestError as err:
        raise RequestError(f"{err.message}: give query or vector", "query") from err
    if not text.strip():
        raise RequestError("the prompt has no text: give query or vector", "query")
    return served.query(text)


def _from_vector(params: RemixParams, served: ServedStore) -> np.ndarray:
    dim = served.store.card.embedder.dim
    if len(params.vector) != dim:
        raise RequestError(
            f"expected {dim} numbers, got {len(params.vector)}", "vector"
        )
    try:
        return unit(np.array(params.vector))[0]
    except ValueError:
        raise RequestError("expected a vector that is not zero", "vector") from None


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
