# SPDX-License-Identifier: Apache-2.0
"""Statistics of recorded routing, as pure functions of counts and arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike


def npmi(
    joint: ArrayLike, marker: ArrayLike, active: ArrayLike, total: ArrayLike
) -> np.ndarray:
    """Return the normalised mutual information of a marker token and an expert.

    `(log2(c / M) + log2(T / K)) / log2(T / c)`, in [-1, 1]: 1 when the expert is
    active on the marker tokens and nowhere else, 0 when independent, -1 when never
    together. An expert active on all of `total` tokens scores 0.

    Source: RICE, arXiv 2505.14681.

    Args:
        joint: Marker tokens on which the expert is active, c.
        marker: Marker tokens, M.
        active: Tokens on which the expert is active, K.
        total: All tokens, T.

    Returns:
        float64 of the arguments' common shape.

    Raises:
        ValueError: counts contradict each other.
    """
    c, m, k, t = np.broadcast_arrays(
        *(np.asarray(x, np.float64) for x in (joint, marker, active, total))
    )
    if ((c < 0) | (c > m) | (c > k) | (m > t) | (k > t) | (t <= 0)).any():
        raise ValueError("counts must satisfy 0 <= joint <= marker, active <= total")
    scores = np.where(c > 0, 0.0, -1.0)
    mixed = (c > 0) & (c < t)
    c, m, k, t = c[mixed], m[mixed], k[mixed], t[mixed]
    scores[mixed] = (np.log2(c / m) + np.log2(t / k)) / np.log2(t / c)
    return scores


def risk_difference(
    selected_with: ArrayLike,
    tokens_with: int,
    selected_without: ArrayLike,
    tokens_without: int,
) -> np.ndarray:
    """Return how much more often experts are selected with a behaviour than without.

    Source: SteerMoE, arXiv 2509.09660, detection.

    Args:
        selected_with: [L, E] target tokens that select each expert, behaviour shown.
        tokens_with: Target tokens that show the behaviour.
        selected_without: [L, E] the same, behaviour absent.
        tokens_without: Target tokens that do not show it.

    Returns:
        [L, E] float64 in [-1, 1], positive for experts of the behaviour.

    Raises:
        ValueError: a class has no tokens.
    """
    if tokens_with <= 0 or tokens_without <= 0:
        raise ValueError(
            f"both classes need tokens, got {tokens_with} and {tokens_without}"
        )
    share_with = np.asarray(selected_with, np.float64) / tokens_with
    return share_with - np.asarray(selected_without, np.float64) / tokens_without


def segment_routing_f1(
    active: ArrayLike, window: int, stride: int = 1
) -> tuple[float, float]:
    """Return segment routing best performance (SRP) and its predicted size ratio.

    The estimator calls an expert on for a whole window when it is active on at least
    a of its tokens; F1 is the best over a, one threshold for all experts given.

    Source: local routing consistency, arXiv 2505.16056.

    Args:
        active: [T] or [T, experts] bool, which tokens use which expert.
        window: Tokens in a window.
        stride: Tokens between window starts; 1 takes all windows.

    Returns:
        best F1 in [0, 1], and predicted over true activations at that threshold
        (rho-hat); both 0 when nothing is active.

    Raises:
        ValueError: there are fewer tokens than a window holds.
    """
    tokens = np.asarray(active, bool)
    if len(tokens) < window:
        raise ValueError(f"{len(tokens)} tokens do not fill a window of {window}")
    running = np.zeros((len(tokens) + 1, tokens[0].size), np.int64)
    np.cumsum(tokens.reshape(len(tokens), -1), axis=0, out=running[1:])
    counts = (running[window:] - running[:-window])[::stride]
    windows = np.bincount(counts.ravel(), minlength=window + 1)[1:]
    sizes = np.arange(1, window + 1)
    # entry a - 1: sums over windows with at least a active tokens
    hit = np.cumsum((sizes * windows)[::-1])[::-1]
    predicted = window * np.cumsum(windows[::-1])[::-1]
    true = hit[0]
    if true == 0:
        return 0.0, 0.0
    scores = 2 * hit / (predicted + true)
    best = int(scores.argmax())
    return float(scores[best]), float(predicted[best] / true)


def gaussian_kernel(
    query: ArrayLike, references: ArrayLike, sigma: float
) -> np.ndarray:
    """Return `exp(-||query - reference||^2 / (2 sigma^2))` for each reference.

    Source: C3PO, arXiv 2504.07964.

    Args:
        query: [D] embedding.
        references: [N, D] embeddings.
        sigma: Width, in units of the embeddings.

    Returns:
        [N] float64 in (0, 1].
    """
    apart = np.asarray(references, np.float64) - np.asarray(query, np.float64)
    return np.exp(-np.square(apart).sum(axis=1) / (2 * sigma**2))


def kernel_regression(weights: ArrayLike, pathways: ArrayLike) -> np.ndarray:
    """Return the weighted mean of reference pathways; it stays on the simplex.

    Source: C3PO, arXiv 2504.07964, kernel regression.

    Args:
        weights: [N] kernel values >= 0.
        pathways: [N, L, E] routing weights of the references.

    Returns:
        [L, E] float64.

    Raises:
        ValueError: no weight is positive, or one is negative.
    """
    kernel = np.asarray(weights, np.float64)
    if (kernel < 0).any() or not kernel.sum() > 0:
        raise ValueError("kernel values must be >= 0 and not all 0")
    return np.tensordot(kernel / kernel.sum(), np.asarray(pathways, np.float64), 1)
