# SPDX-License-Identifier: Apache-2.0
"""C3PO's searches on the neighbours' loss: gradient descent, and a line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.neighbours import NeighbourTail


@dataclass(frozen=True)
class GradientDescent:
    """Settings of neighbourhood gradient descent (NGD).

    Source: C3PO (arXiv 2504.07964): steps and core experts; the cosine schedule is that
    of its sibling R2-T2.

    Attributes:
        steps: How many.
        lr: Learning rate of the first step.
        lr_end: What the cosine falls to after the last step.
        core: Experts a layer that may be used, the first by initial weight.
    """

    steps: int = 10
    lr: float = 1e-2
    lr_end: float = 1e-5
    core: int = 20


class Remixed(NamedTuple):
    """New distributions of Q requests; one that failed has those it came with."""

    omega: torch.Tensor  # [Q, layers, E] f32, >= 0, sums of 1
    losses: torch.Tensor  # [Q, steps + 1] nats a token
    finite: torch.Tensor  # [Q] bool


def core_experts(omega: torch.Tensor, count: int) -> torch.Tensor:
    """Return which experts are among the first `count` by weight, [..., E] bool."""
    order = omega.sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(omega, dtype=torch.bool)
    return chosen.scatter(-1, order[..., :count], True)


def to_distribution(omega: torch.Tensor) -> torch.Tensor:
    """Cut negative entries off and divide [..., E] by the sum."""
    positive = omega.clamp_min(0)
    return positive / positive.sum(dim=-1, keepdim=True)


@torch.inference_mode(False)
@torch.no_grad()
def descend_neighbours(
    tail: NeighbourTail, start: torch.Tensor, settings: GradientDescent
) -> Remixed:
    """Lower the neighbours' weighted loss over the overridden row's distributions.

    `omega <- omega - lr(t) grad L_sur(omega)`. With one neighbour that is the request
    itself and its label, this is C3PO's oracle, for research only.

    Source: C3PO (arXiv 2504.07964), NGD.
    Differs: experts outside the core are 0, and each step ends with a cut at 0 and a
    division by the sum, so that a plan can hold the result; the paper says neither.

    Args:
        tail: The neighbours, over the layers of `start`.
        start: [Q, layers, E] f32, each request's own routing at its last prompt token.
        settings: Steps and rates.
    """
    start = start.to(tail.model.device, torch.float32)
    core = core_experts(start, settings.core)
    omega = to_distribution(torch.where(core, start, 0.0))
    rule = torch.optim.SGD([omega], lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(
        rule, settings.steps, settings.lr_end
    )
    gradient = autograd_gradient(tail.loss)
    finite = torch.ones(len(start), dtype=torch.bool, device=start.device)
    losses = []
    for _ in range(settings.steps):
        values, slope = gradient(omega)
        finite &= values.isfinite() & slope.isfinite().flatten(1).all(dim=1)
        losses.append(values)
        omega.grad = torch.where(core & finite[:, None, None], slope, 0.0)
        rule.step()
        schedule.step()
        omega.copy_(to_distribution(omega))
        finite &= omega.isfinite().flatten(1).all(dim=1)
    losses.append(tail.loss(omega))
    finite &= losses[-1].isfinite()
    kept = torch.where(finite[:, None, None], omega, start)
    return Remixed(kept, torch.stack(losses, dim=1), finite)


class Line(NamedTuple):
    """The best point between two distributions, for each of Q requests."""

    alpha: torch.Tensor  # [Q], share of the first
    omega: torch.Tensor  # [Q, layers, E]
    loss: torch.Tensor  # [Q] nats a token


@torch.inference_mode(False)
@torch.no_grad()
def search_alpha(
    tail: NeighbourTail, own: torch.Tensor, other: torch.Tensor, points: int = 11
) -> Line:
    """Search `alpha own + (1 - alpha) other` for the neighbours' least loss.

    A grid over [0, 1], then as many points between the best one's two neighbours: the
    loss jumps where an expert enters or leaves, so nothing is assumed of its form.
    alpha = 1, the request's own routing, is on the grid, so the result is never worse
    on the neighbours; where losses are not finite it stays 1.

    Source: C3PO (arXiv 2504.07964), kernel regression with alpha by 1-D search.

    Args:
        tail: The neighbours.
        own: [Q, layers, E], each request's routing.
        other: [Q, layers, E], its neighbours' average.
        points: Of each grid, 2 or more.
    """
    own, other = (t.to(tail.model.device, torch.float32) for t in (own, other))
    grid = torch.linspace(0, 1, points, device=own.device).expand(len(own), -1)
    losses = _losses(tail, own, other, grid)
    coarse, _ = _best(grid, losses)
    step = 1 / (points - 1)
    inner = torch.linspace(-step, step, points, device=own.device)
    near = (coarse[:, None] + inner).clamp(0, 1)
    near_losses = _losses(tail, own, other, near)
    alpha, loss = _best(
        torch.cat([near, grid], dim=1), torch.cat([near_losses, losses], dim=1)
    )
    return Line(alpha, _between(own, other, alpha), loss)


def _between(
    own: torch.Tensor, other: torch.Tensor, alpha: torch.Tensor
) -> torch.Tensor:
    share = alpha[:, None, None]
    return share * own + (1 - share) * other


def _losses(
    tail: NeighbourTail, own: torch.Tensor, other: torch.Tensor, alphas: torch.Tensor
) -> torch.Tensor:
    """Return each request's losses [Q, points] at its alphas [Q, points]."""
    losses = [tail.loss(_between(own, other, alpha)) for alpha in alphas.unbind(dim=1)]
    return torch.stack(losses, dim=1)


def _best(
    alphas: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the alphas [Q] of least loss, the largest of equals, and their losses."""
    alphas, order = alphas.sort(dim=1, descending=True)
    losses = losses.gather(1, order)
    finite = torch.where(losses.isfinite(), losses, float("inf"))
    best = finite.argmin(dim=1, keepdim=True)
    return alphas.gather(1, best)[:, 0], losses.gather(1, best)[:, 0]
