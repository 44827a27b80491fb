# SPDX-License-Identifier: Apache-2.0
"""The operator's stores as strategies ask for them: by name, kind and layers."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from moe_tta.errors import RequestError, did_you_mean, show
from moe_tta.shape import RouterShape
from moe_tta.strategies.base import PlanContext, as_ranges, layers_in

Kind = TypeVar("Kind")


def store_named(name: str, context: PlanContext, kind: type[Kind]) -> Kind:
    """Return the operator's store of this name.

    Args:
        name: From a request's member `store`.
        context: With the operator's stores.
        kind: `ServedStore` or `ServedTokens`.

    Raises:
        RequestError: there is none, it cannot be used, or it is of the other kind.
    """
    found = context.stores.get(name)
    if found is None:
        hint = did_you_mean(name, context.stores)
        raise RequestError(f"unknown store {show(name)}; {hint}", "store", name)
    if isinstance(found, Exception):
        raise RequestError(f"cannot be used: {found}", "store", name)
    if not isinstance(found, kind):
        raise RequestError(
            f"expected a store of {kind.HOLDS}, got one of {found.HOLDS}: that is for "
            f"{found.FOR}",
            "store",
            name,
        )
    return found


def held_layers(
    layers: tuple[int, int] | None, shape: RouterShape, held: list[int]
) -> np.ndarray:
    """Return bool [L]: the layers asked for, or all that a store holds.

    Raises:
        RequestError: the range is none of this model, or the store lacks a layer of it.
    """
    there = np.isin(shape.layers, held)
    if layers is None:
        return there
    covered = layers_in(shape, layers)
    if (covered & ~there).any():
        raise RequestError(
            f"expected layers this store holds ({as_ranges(tuple(held))}), "
            f"got {show(layers)}",
            "layers",
            layers,
        )
    return covered
