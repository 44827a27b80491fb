# SPDX-License-Identifier: Apache-2.0
"""Gradients from losses alone, where nothing can be differentiated."""

from __future__ import annotations

from collections.abc import Callable

import torch

# vectors [R, L, E] -> loss of each request [R]
Loss = Callable[[torch.Tensor], torch.Tensor]


def spsa_gradient(
    loss: Loss,
    delta: torch.Tensor,
    free: torch.Tensor,
    radius: float,
    pairs: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Estimate each request's gradient from antithetic pairs of losses.

    `g = mean over pairs of (L(x + c d) - L(x - c d)) / (2 c) * d`, with d of +-1 in
    the free entries: unbiased up to O(c^2), 2 losses a pair whatever the size of x.

    Source: Spall 1992, simultaneous perturbation stochastic approximation.

    Args:
        loss: Called 2 `pairs` times; may run on another engine.
        delta: [R, L, E], the point.
        free: [R, L] bool, layers that are perturbed.
        radius: c, in the unit of the vectors (logits).
        pairs: How many.
        generator: Draws d, on the CPU, so that a run can be repeated.

    Returns:
        Mean loss of the pairs [R], in place of the loss at the point, which costs
        nothing more; and the estimate [R, L, E], 0 outside the free layers.
    """
    gradient, level = torch.zeros_like(delta), 0.0
    for _ in range(pairs):
        signs = torch.randint(0, 2, delta.shape, generator=generator) * 2 - 1
        step = signs.to(delta) * free[:, :, None]
        above, below = loss(delta + radius * step), loss(delta - radius * step)
        slope = ((above - below) / (2 * radius)).to(delta.dtype)
        gradient += slope[:, None, None] * step / pairs
        level = level + (above + below) / (2 * pairs)
    return level, gradient
