# SPDX-License-Identifier: Apache-2.0
"""Gradients and descents from losses alone, where nothing can be differentiated.

Both are written as questions: they yield points [N, R, L, E] and are sent the losses
there [N, R]. Who answers is not their business: a model in this process, or requests
that an engine serves beside others.
"""

from __future__ import annotations

from collections.abc import Callable, Generator

import torch

from moe_tta.adapter.descent import Descent, Walk

# vectors [R, L, E] -> loss of each request [R]
Loss = Callable[[torch.Tensor], torch.Tensor]
# mean loss of the pairs [R], gradient [R, L, E]
Estimate = tuple[torch.Tensor, torch.Tensor]


def spsa_estimate(
    delta: torch.Tensor,
    free: torch.Tensor,
    radius: float,
    pairs: int,
    generator: torch.Generator,
) -> Generator[torch.Tensor, torch.Tensor, Estimate]:
    """Estimate each request's gradient from antithetic pairs of losses.

    `g = mean over pairs of (L(x + c d) - L(x - c d)) / (2 c) * d`, with d of +-1 in
    the free entries: unbiased up to O(c^2), 2 losses a pair whatever the size of x.

    Source: Spall 1992, simultaneous perturbation stochastic approximation.

    Args:
        delta: [R, L, E], the point.
        free: [R, L] bool, layers that are perturbed.
        radius: c, in the unit of the vectors (logits).
        pairs: How many.
        generator: Draws d, on the CPU, so that a run can be repeated.

    Yields:
        Once, the points: x + c d and x - c d of each pair in turn.

    Returns:
        Mean loss of the pairs [R], in place of the loss at the point, which costs
        nothing more; and the estimate [R, L, E], 0 outside the free layers.
    """
    directions = []
    for _ in range(pairs):
        signs = torch.randint(0, 2, delta.shape, generator=generator) * 2 - 1
        directions.append(signs.to(delta) * free[:, :, None])
    points = [delta + sign * radius * d for d in directions for sign in (1, -1)]
    losses = yield torch.stack(points)
    gradient, level = torch.zeros_like(delta), 0.0
    for d, above, below in zip(directions, losses[::2], losses[1::2], strict=True):
        slope = ((above - below) / (2 * radius)).to(delta.dtype)
        gradient += slope[:, None, None] * d / pairs
        level = level + (above + below) / (2 * pairs)
    return level, gradient


def spsa_gradient(
    loss: Loss,
    delta: torch.Tensor,
    free: torch.Tensor,
    radius: float,
    pairs: int,
    generator: torch.Generator,
) -> Estimate:
    """Run `spsa_estimate` on a loss, which is called 2 `pairs` times."""
    asking = spsa_estimate(delta, free, radius, pairs, generator)
    losses = torch.stack([loss(point) for point in next(asking)])
    try:
        asking.send(losses)
    except StopIteration as end:
        return end.value
    raise AssertionError("an estimate asks once")


def spsa_descent(
    start: torch.Tensor,
    rates: torch.Tensor,
    lr: float,
    steps: int,
    clip: float,
    radius: float,
    pairs: int,
    generator: torch.Generator,
) -> Generator[torch.Tensor, torch.Tensor, Descent]:
    """Take `steps` steps on estimates, then ask for the loss where they ended.

    What `descent_steps` does with `spsa_gradient`, for losses that come later; the
    arguments are theirs.
    """
    walk = Walk(start, rates, "spsa", lr, clip)
    for _ in range(steps):
        estimate = spsa_estimate(walk.delta, rates > 0, radius, pairs, generator)
        walk.step(*(yield from estimate))
    [last] = yield walk.delta[None].clone()
    return walk.end(last)
