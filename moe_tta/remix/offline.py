# SPDX-License-Identifier: Apache-2.0
"""Updates computed outside the server: for studies, and for what serving refuses.

A run in two passes: `record_pathways` of the plugin gives each prompt's own pathway and
hidden states, an update turns them into a distribution, and `as_request` sends it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moe_tta.remix.lookup import LookUp, find_neighbours, read_pathways
from moe_tta.remix.store import Store
from moe_tta.remix.updates import Borrowed, mean_shift


def borrow(
    store: Store, query: np.ndarray, how: LookUp, layers: Sequence[int]
) -> Borrowed | None:
    """Return a query's neighbours with their pathways, as the server would.

    Args:
        store: The references.
        query: [D] unit embedding.
        how: The look-up.
        layers: Decoder layers, held by the store.

    Returns:
        `None` where no reference counts.

    Raises:
        StoreError: the store does not hold a layer, or was damaged.
    """
    found = find_neighbours(store, np.asarray(query, np.float32), how)
    return None if found is None else read_pathways(store, found, list(layers))


def nearest_by_pathway(
    store: Store, own: np.ndarray, k: int, layers: Sequence[int]
) -> Borrowed:
    """Return the references whose pathways are nearest to one's own.

    Source: C3PO, arXiv 2504.07964, mode finding: the neighbourhood is measured between
    pathways, not texts.

    Args:
        store: The references.
        own: [L, E] the request's own pathway of `layers`.
        k: How many.
        layers: Decoder layers, held by the store.

    Returns:
        Nearest first, ties by place; `weights` are 1 and `similarities` the cosines
        of whole pathways.
    """
    kept_rows = np.zeros(0, np.int64)
    kept = np.zeros((0, *np.shape(own)))
    for rows, pathways in store.blocks(list(layers)):
        kept_rows = np.concatenate([kept_rows, rows])
        kept = np.concatenate([kept, pathways.astype(np.float64)])
        apart = np.square(kept - own).sum(axis=(1, 2))
        nearest = np.argsort(apart, kind="stable")[:k]
        kept_rows, kept = kept_rows[nearest], kept[nearest]
    flat, mine = kept.reshape(len(kept), -1), np.ravel(own)
    lengths = np.linalg.norm(flat, axis=1) * np.linalg.norm(mine)
    return Borrowed(kept_rows, flat @ mine / lengths, np.ones(len(kept)), kept)


def find_mode(
    store: Store,
    own: np.ndarray,
    layers: Sequence[int],
    *,
    k: int = 3,
    alpha: float = 0.0,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    steps: int = 1,
) -> np.ndarray:
    """Return the distribution [L, E] of mode finding among the k nearest pathways.

    Arguments are those of `nearest_by_pathway` and `updates.mean_shift`.
    """
    near = nearest_by_pathway(store, own, k, layers)
    return mean_shift(
        own,
        near.pathways,
        kernel=kernel,
        bandwidth=bandwidth,
        alpha=alpha,
        steps=steps,
    )


def as_request(layers: Sequence[int], target: np.ndarray) -> dict[str, Any]:
    """Return the request's `remix` member that gives `layers` these distributions.

    Args:
        layers: Decoder layers.
        target: [L, E] >= 0; each row is scaled to sum 1.

    Raises:
        ValueError: a row is negative, not finite, or without mass.
    """
    rows = np.asarray(target, np.float64)
    sums = rows.sum(axis=1, keepdims=True)
    if not (np.isfinite(rows).all() and (rows >= 0).all() and (sums > 0).all()):
        raise ValueError("expected rows >= 0 with mass")
    shares = (rows / sums).tolist()
    return {
        "distribution": {
            str(layer): row for layer, row in zip(layers, shares, strict=True)
        }
    }
