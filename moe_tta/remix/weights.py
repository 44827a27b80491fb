# SPDX-License-Identifier: Apache-2.0
"""Kernels: how much each neighbour counts, by its distance to the query."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

POLYNOMIAL_DEGREE = 3

Kernel = Callable[[np.ndarray, float], np.ndarray]


def gaussian(distances: np.ndarray, bandwidth: float) -> np.ndarray:
    """Return `exp(-d^2 / (2 h^2))`. Source: C3PO, arXiv 2504.07964, section 3."""
    return np.exp(-np.square(distances / bandwidth) / 2)


def matern(distances: np.ndarray, bandwidth: float) -> np.ndarray:
    """Return `(1 + a) exp(-a)` with `a = sqrt(3) d / h`: Matérn of order 3/2.

    Source: C3PO names Matérn without its order; 3/2 is scikit-learn's default.
    """
    scaled = np.sqrt(3.0) * distances / bandwidth
    return (1 + scaled) * np.exp(-scaled)


def weigh_by_distance(
    kernel: Kernel, distances: np.ndarray, bandwidth: float | None = None
) -> np.ndarray:
    """Weigh neighbours by a kernel with a width.

    Args:
        kernel: `gaussian` or `matern`.
        distances: [K] float64 >= 0.
        bandwidth: Width h > 0; `None` takes the median of `distances`. Where that is
            0, the limit of narrow kernels: 1 at distance 0, else 0.

    Returns:
        [K] float64 in [0, 1], scaled so that the nearest has 1: a far query must not
        lose all weights to underflow, and only their ratios matter.
    """
    width = float(np.median(distances)) if bandwidth is None else bandwidth
    if width == 0:
        return (distances == 0).astype(np.float64)
    values = kernel(distances, width)
    best = values.max()
    if best > 0:
        return values / best
    # all underflow: the nearest alone is left in the limit
    return (distances == distances.min()).astype(np.float64)


def cosine(similarities: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Weigh by cosine similarity, negatives as 0. Source: C3PO's released code."""
    return np.maximum(similarities, 0.0)


def linear(similarities: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Weigh by the inner product, negatives as 0.

    The query's own length is left out: it cancels. With an embedder of unit vectors
    this is `cosine`.
    """
    return np.maximum(similarities, 0.0) * norms


def polynomial(similarities: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Weigh by `(1 + cosine)^3`, the polynomial kernel of degree 3 on unit vectors."""
    return (1.0 + np.maximum(similarities, -1.0)) ** POLYNOMIAL_DEGREE


BY_DISTANCE: dict[str, Kernel] = {"gaussian": gaussian, "matern": matern}
BY_PRODUCT: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "cosine": cosine,
    "linear": linear,
    "polynomial": polynomial,
}
KERNELS = (*BY_DISTANCE, *BY_PRODUCT)


def weigh(
    kernel: str,
    similarities: np.ndarray,
    norms: np.ndarray,
    bandwidth: float | None = None,
) -> np.ndarray:
    """Weigh neighbours by a kernel of the query's and their unit embeddings.

    Args:
        kernel: One of `KERNELS`.
        similarities: [K] cosine similarities to the query.
        norms: [K] lengths of the neighbours' embeddings before they were scaled to 1.
        bandwidth: Of `BY_DISTANCE` kernels; `None` is the median distance.

    Returns:
        [K] float64 >= 0; all 0 where no neighbour counts.
    """
    similarities = np.asarray(similarities, np.float64)
    if kernel in BY_DISTANCE:
        distances = distance(similarities)
        return weigh_by_distance(BY_DISTANCE[kernel], distances, bandwidth)
    return BY_PRODUCT[kernel](similarities, np.asarray(norms, np.float64))


def distance(similarities: np.ndarray | float) -> np.ndarray:
    """Return the Euclidean distance of unit vectors: `sqrt(2 - 2 cos)`."""
    return np.sqrt(np.maximum(2.0 - 2.0 * np.asarray(similarities, np.float64), 0.0))
