# SPDX-License-Identifier: Apache-2.0
"""The neighbours of a request, and the layers that borrow from them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_tta.errors import RequestError
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
from moe_tta.strategies.base import PlanContext
from moe_tta.strategies.operator_stores import held_layers, store_named

if TYPE_CHECKING:
    from moe_tta.remix.updates import Borrowed
    from moe_tta.strategies.remix.params import RemixParams

LAST_LAYERS = 5  # C3PO, arXiv 2504.07964: the last five MoE layers


def borrow(params: RemixParams, context: PlanContext) -> Borrowed | None:
    """Return the request's neighbours, with their pathways of the covered layers.

    Returns:
        `None` where no reference is near.

    Raises:
        RequestError: the request has no embedding, or the store cannot be read.
    """
    served = store_named(params.store, context, ServedStore)
    query = _query(params, served, context)
    try:
        found = find_neighbours(served.store, query, look_up(params))
        if found is None:
            return None
        return read_pathways(served.store, found, covered_layers(params, context))
    except StoreError as err:
        raise RequestError(str(err), "store", params.store) from err


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


def covered_layers(params: RemixParams, context: PlanContext) -> list[int]:
    """Return the decoder layers to change, all held by the store.

    Raises:
        RequestError: `layers` is no range of the model's, or the store lacks one.
    """
    shape = context.shape
    served = store_named(params.store, context, ServedStore)
    covered = held_layers(params.layers, shape, served.store.card.layers)
    if params.layers is None:
        covered &= np.cumsum(covered[::-1])[::-1] <= LAST_LAYERS
    return np.array(shape.layers)[covered].tolist()


def _query(
    params: RemixParams, served: ServedStore, context: PlanContext
) -> np.ndarray:
    """Return the query's unit embedding [D] float32."""
    if params.vector is not None:
        return from_vector(params, served)
    if params.query is not None:
        return served.query(params.query)
    try:
        text = context.prompt.text
    except RequestError as err:
        raise RequestError(f"{err.message}: give query or vector", "query") from err
    if not text.strip():
        raise RequestError("the prompt has no text: give query or vector", "query")
    return served.query(text)


def from_vector(params: RemixParams, served: ServedStore) -> np.ndarray:
    """Return the request's own vector as unit embedding [D] float32.

    Raises:
        RequestError: it is not of the store's length, or zero.
    """
    dim = served.store.card.embedder.dim
    if len(params.vector) != dim:
        raise RequestError(
            f"expected {dim} numbers, got {len(params.vector)}", "vector"
        )
    try:
        return unit(np.array(params.vector))[0]
    except ValueError:
        raise RequestError("expected a vector that is not zero", "vector") from None
