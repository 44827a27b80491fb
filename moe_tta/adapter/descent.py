# SPDX-License-Identifier: Apache-2.0
"""Steps on the additive vectors of several requests that never meet."""

from __future__ import annotations

from collections.abc import Callable, Generator
from functools import partial
from typing import Any, NamedTuple

import torch

# vectors [R, L, E] -> losses [R], gradient [R, L, E]
Gradient = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
# where weights are renormalised, an expert that no row chose has a gradient of exactly
# 0 but for rounding, some 1e-8; with torch's eps, 1e-8, Adam makes whole steps of that
ADAM_EPS = 1e-5
OPTIMIZERS = {
    "adam": partial(torch.optim.Adam, eps=ADAM_EPS),
    "sgd": torch.optim.SGD,
    "spsa": torch.optim.SGD,
}


class Descent(NamedTuple):
    """Where `descend` ended; a request that failed is back where it began."""

    delta: torch.Tensor  # [R, L, E]
    losses: torch.Tensor  # [R, steps or + 1] nats: before each step, perhaps at the end
    finite: torch.Tensor  # [R] bool: no loss or gradient was NaN or infinite


def autograd_gradient(loss: Callable[[torch.Tensor], torch.Tensor]) -> Gradient:
    """Return losses and their exact gradients; requests share no entry of the vectors.

    Args:
        loss: Differentiable, vectors [R, L, E] -> [R].
    """

    def gradient(delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            leaf = delta.detach().clone().requires_grad_()
            losses = loss(leaf)
            (slope,) = torch.autograd.grad(losses.sum(), leaf)
        return losses.detach(), slope

    return gradient


class Walk:
    """A descent between two of its steps. Use it under `torch.no_grad`.

    A layer's rate scales its *step*: Adam would divide a scaled gradient by its own
    scale again.

    Args:
        start: [R, L, E] f32.
        rates: [R, L] f32; 0 leaves a layer as it is.
        optimizer: A name of `OPTIMIZERS`.
        lr: Learning rate, logits a step for Adam.
        clip: Largest |entry| of the vectors, in logits.

    Attributes:
        delta: [R, L, E], where it stands.
    """

    def __init__(
        self,
        start: torch.Tensor,
        rates: torch.Tensor,
        optimizer: str,
        lr: float,
        clip: float,
    ):
        self._start, self._rates, self._clip = start, rates[:, :, None], clip
        self.delta = start.clone()
        self._rule = OPTIMIZERS[optimizer]([self.delta], lr=lr)
        self._finite = torch.ones(len(start), dtype=torch.bool, device=start.device)
        self._losses: list[torch.Tensor] = []

    def step(self, losses: torch.Tensor, slope: torch.Tensor) -> None:
        """Take a step, held within `clip` of zero, entry by entry.

        Args:
            losses: [R], at `delta`.
            slope: [R, L, E], the gradient there.
        """
        self._finite &= losses.isfinite() & slope.isfinite().flatten(1).all(dim=1)
        self._losses.append(losses)
        before, rates = self.delta.clone(), self._rates
        going = self._finite[:, None, None] & (rates > 0)
        self.delta.grad = torch.where(going, slope, 0.0)
        self._rule.step()
        moved = before + rates * (self.delta - before)
        moved = moved.clamp(-self._clip, self._clip)
        self.delta.copy_(torch.where(going, moved, before))

    def end(self, losses: torch.Tensor | None = None) -> Descent:
        """Return the result, given the losses [R] at `delta`, if they are known."""
        if losses is not None:
            self._finite &= losses.isfinite()
            self._losses.append(losses)
        delta = torch.where(self._finite[:, None, None], self.delta, self._start)
        return Descent(delta, torch.stack(self._losses, dim=1), self._finite)


def descent_steps(
    gradient: Gradient,
    loss: Callable[[torch.Tensor], torch.Tensor] | None,
    start: torch.Tensor,
    rates: torch.Tensor,
    optimizer: str,
    lr: float,
    steps: int,
    clip: float,
    first: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Generator[None, None, Descent]:
    """Take `steps` steps of a `Walk`; pauses after each, but after no last loss.

    Run it under `torch.no_grad`.

    Args:
        gradient: At the current vectors.
        loss: Without gradients, for a last value; `None` takes none.
        start: As the rest, `Walk`'s.
        rates: See there.
        optimizer: See there.
        lr: See there.
        steps: How many.
        clip: See there.
        first: The gradient at the start, if it is known.
    """
    walk = Walk(start, rates, optimizer, lr, clip)
    for number in range(steps):
        known = number == 0 and first is not None
        walk.step(*(first if known else gradient(walk.delta)))
        if number + 1 < steps or loss is not None:
            yield
    return walk.end(None if loss is None else loss(walk.delta))


@torch.no_grad()
def descend(*args: Any, **kwargs: Any) -> Descent:
    """Run `descent_steps` to its end, without a pause."""
    steps = descent_steps(*args, **kwargs)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value
