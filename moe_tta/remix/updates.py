# SPDX-License-Identifier: Apache-2.0
"""Updates: from neighbours' pathways to the distribution a request is given.

Plain numpy in float64, and the reference of whatever computes them elsewhere. An
update takes weighted pathways and, if it needs it, the request's own pathway, and
returns a distribution [L, E] over the experts of the covered layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe_tta.diagnostics import kernel_regression
from moe_tta.remix.weights import BY_DISTANCE, weigh_by_distance


class Borrowed(NamedTuple):
    """Neighbours as an update sees them, nearest first; K of them."""

    rows: np.ndarray  # [K] int64, their places in the store
    similarities: np.ndarray  # [K] float64, cosine to the query
    weights: np.ndarray  # [K] float64 >= 0, kernel values, not all 0
    pathways: np.ndarray  # [K, L, E] routing distributions


# (neighbours, the request's own pathway [L, E]) -> distribution [L, E]; gradient
# descent on the neighbours' loss is one more of these
Update = Callable[[Borrowed, np.ndarray], np.ndarray]


def blend(own: np.ndarray, borrowed: np.ndarray, alpha: float) -> np.ndarray:
    """Return `alpha own + (1 - alpha) borrowed`. Source: C3PO, arXiv 2504.07964."""
    return alpha * np.asarray(own, np.float64) + (1 - alpha) * borrowed


def confidence(similarities: np.ndarray) -> float:
    """Return kNN-MoE's share of the neighbours: their mean similarity, in [0, 1].

    Source: kNN-MoE, arXiv 2601.02144: `w = (1 - lambda) w_router + lambda w_nn`.
    """
    return float(np.clip(np.mean(similarities), 0.0, 1.0))


def regress(neighbours: Borrowed) -> np.ndarray:
    """Return the weighted mean pathway [L, E], which needs no pathway of one's own."""
    return kernel_regression(neighbours.weights, neighbours.pathways)


def mean_shift(
    own: np.ndarray,
    pathways: np.ndarray,
    *,
    kernel: str = "gaussian",
    bandwidth: float | None = None,
    alpha: float = 0.0,
    steps: int = 1,
) -> np.ndarray:
    """Move a pathway towards the mode of the reference pathways around it.

    Each step: `K_i = K(||omega_i - omega||)` over whole pathways, their weighted mean,
    and `omega <- alpha omega + (1 - alpha) mean`.

    Source: C3PO, arXiv 2504.07964, mode finding (one step).
    Differs: the paper names no width; the default is the median distance of each step.

    Args:
        own: [L, E] the request's own pathway.
        pathways: [K, L, E] the references around it.
        kernel: One of `BY_DISTANCE`.
        bandwidth: Width in units of distance between pathways.
        alpha: Share of the pathway that stays, 0..1.
        steps: How often to move.

    Returns:
        [L, E] float64; rows stay distributions.
    """
    omega = np.asarray(own, np.float64)
    references = np.asarray(pathways, np.float64)
    for _ in range(steps):
        apart = np.sqrt(np.square(references - omega).sum(axis=(1, 2)))
        weights = weigh_by_distance(BY_DISTANCE[kernel], apart, bandwidth)
        omega = blend(omega, kernel_regression(weights, references), alpha)
    return omega


def nearest_pathways(own: np.ndarray, pathways: np.ndarray, k: int) -> np.ndarray:
    """Return the places [k] of the pathways nearest to one's own, ties by place."""
    apart = np.asarray(pathways, np.float64) - np.asarray(own, np.float64)
    return np.argsort(np.square(apart).sum(axis=(1, 2)), kind="stable")[:k]
