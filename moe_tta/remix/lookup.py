# SPDX-License-Identifier: Apache-2.0
"""Look-up: a query's neighbours in a store, weighed by a kernel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_tta.remix.store import Store
from moe_tta.remix.updates import Borrowed
from moe_tta.remix.weights import distance, weigh

MAX_NEIGHBOURS = 64
DEFAULT_K = 3  # C3PO, arXiv 2504.07964


@dataclass(frozen=True)
class LookUp:
    """Which references are neighbours, and how much each counts.

    Attributes:
        k: The most neighbours, at most `MAX_NEIGHBOURS`.
        radius: Greatest distance of unit embeddings, 0..2; `None` sets no bound.
        kernel: One of `weights.KERNELS`.
        bandwidth: Width of kernels by distance; `None` is the neighbours' median.
        floor: Least cosine similarity of a neighbour.
        ceiling: Greatest one: above it a reference counts as the question itself.
    """

    k: int = DEFAULT_K
    radius: float | None = None
    kernel: str = "gaussian"
    bandwidth: float | None = None
    floor: float = 0.0
    ceiling: float = 1.0


def find_neighbours(store: Store, query: np.ndarray, how: LookUp) -> Borrowed | None:
    """Look a query up; the pathways are left for `read_pathways`.

    Args:
        store: The references.
        query: [D] unit embedding, float32.
        how: The rule.

    Returns:
        Neighbours with `pathways` [K, 0, 0], or `None` where no reference counts.
    """
    similarities, rows = _nearest(store, query, how)
    near = similarities >= how.floor
    if how.radius is not None:
        near &= distance(similarities) <= how.radius
    similarities, rows = similarities[near][: how.k], rows[near][: how.k]
    if not len(rows):
        return None
    norms = store.norms(rows)
    weights = weigh(how.kernel, similarities, norms, how.bandwidth)
    if not weights.sum() > 0:
        return None
    nothing = np.zeros((len(rows), 0, 0), np.float32)
    return Borrowed(rows, similarities.astype(np.float64), weights, nothing)


def read_pathways(store: Store, found: Borrowed, layers: list[int]) -> Borrowed:
    """Return the neighbours with their pathways of some decoder layers."""
    return found._replace(pathways=store.pathways(found.rows, layers))


def _nearest(
    store: Store, query: np.ndarray, how: LookUp
) -> tuple[np.ndarray, np.ndarray]:
    """Return (similarities, rows) of the k nearest not above the ceiling."""
    asked = how.k
    while True:
        found, rows = store.index.search(query[None], asked)
        # an index of lists pads with -1; a unit vector with itself may exceed 1
        valid = rows[0] >= 0
        similarities = np.clip(found[0][valid], -1.0, 1.0)
        below = similarities <= how.ceiling
        if below.sum() >= how.k or asked >= len(store) or not valid.all():
            return similarities[below], rows[0][valid][below]
        asked = min(2 * asked + 16, len(store))
