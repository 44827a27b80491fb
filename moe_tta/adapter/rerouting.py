# SPDX-License-Identifier: Apache-2.0
"""What a round of online rerouting is: better vectors from the requests' own text."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum
from functools import partial

import torch

from moe_tta.adapter.choice import hard_choice, named_choice, soft_choice
from moe_tta.adapter.descent import (
    OPTIMIZERS,
    Descent,
    Gradient,
    descent_steps,
)
from moe_tta.adapter.errors import AdapterError
from moe_tta.adapter.model import AdapterModel
from moe_tta.adapter.packing import PackedTexts
from moe_tta.adapter.spsa import spsa_gradient
from moe_tta.adapter.survey import Survey, opening, survey
from moe_tta.adapter.tail import Tail


@dataclass(frozen=True)
class Rerouting:
    """How a round adapts.

    Source: `steps` and `lr` are the paper's (arXiv 2510.14853). Optimiser, share, hard
    or soft, clip and `skip` are unconfirmed there: these defaults are ours.

    Attributes:
        steps: n.
        lr: Learning rate, in logits a step for Adam.
        optimizer: `adam`, `sgd`, or `spsa` (no gradients; steps as `sgd`).
        choice: `hard` adapts the top share of layers, `soft` all, by weight.
        share: Of the layers, for `hard`.
        sign: 1 prefers layers of large C_l, -1 of small; see `hard_choice`.
        layers: Decoder layers to adapt instead of a choice by confidence.
        clip: Largest |entry| of the vectors, in logits.
        skip: Tokens at the head of a context that are not scored.
        radius: c of SPSA, in logits.
        pairs: Antithetic pairs a step of SPSA.
        seed: Of SPSA's directions.
        recompute: Keep only layer inputs for the backward pass: less memory, slower.
        last_loss: Whether the loss at the end is taken, by one more forward pass;
            not for `spsa`, which always does.
    """

    steps: int = 5
    lr: float = 0.05
    optimizer: str = "adam"
    choice: str = "hard"
    share: float = 0.5
    sign: int = 1
    layers: tuple[int, ...] | None = None
    clip: float = 1.0
    skip: int = 0
    radius: float = 0.05
    pairs: int = 4
    seed: int = 0
    recompute: bool = False
    last_loss: bool = True

    def __post_init__(self):
        allowed = {
            "optimizer": tuple(OPTIMIZERS),
            "choice": ("hard", "soft"),
            "sign": (1, -1),
        }
        for name, values in allowed.items():
            if (given := getattr(self, name)) not in values:
                raise ValueError(f"{name} is {given!r}, expected one of {values}")
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected at least 1")
        if not 0 < self.share <= 1:
            raise ValueError(f"share is {self.share}, expected more than 0, at most 1")
        if self.layers is not None and not self.layers:
            raise ValueError("layers is empty: name one, or None for the choice")

    @property
    def passes(self) -> tuple[int, ...]:
        """Forward passes over the context that each unit of a round costs.

        Units: every step, of which the first is the survey, too, and the last loss,
        if it is taken; with `spsa` the survey before. A backward pass counts as one
        forward, which is about its cost.
        """
        if self.optimizer == "spsa":
            return (1, *[2 * self.pairs] * self.steps, 1)
        return (*[2 + self.recompute] * self.steps, *[1] * self.last_loss)


class Outcome(Enum):
    """What became of a request in a round."""

    ADAPTED = "adapted"
    NO_TARGETS = "no token to score"
    NON_FINITE = "loss or gradient not finite"
    OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Round:
    """The result of one request; unless adapted, `delta` is what it came with.

    Attributes:
        outcome: What happened.
        delta: [L, E] f32.
        losses: Nats a token, before each step and, if it was taken, after the last;
            empty if not run.
        layers: Decoder layers that were adapted.
    """

    outcome: Outcome
    delta: torch.Tensor
    losses: tuple[float, ...]
    layers: tuple[int, ...]


def round_units(
    model: AdapterModel, texts: PackedTexts, delta: torch.Tensor, settings: Rerouting
) -> Generator[None, None, list[Round]]:
    """Run a round; pause after each unit of `Rerouting.passes` but the last.

    Args:
        model: The adapter.
        texts: R of them.
        delta: [R, L, E] f32 vectors in force.
        settings: The same for all.
    """
    first = None
    if settings.optimizer == "spsa":
        surveyed = survey(model, texts, delta)
        yield
    else:
        lowest = min(_named_places(model, settings) or (0,))
        surveyed, *first = opening(
            model, texts, delta, settings.skip, lowest, settings.recompute
        )
    rates = layer_rates(model, surveyed, settings)
    lowest, hidden = surveyed.below(int((rates > 0).any(dim=0).nonzero()[0]))
    # the other layers' inputs go, and what a graph may overwrite is copied
    hidden, surveyed = hidden.clone(), None
    tail = Tail(model, texts, hidden, lowest, settings.skip, settings.recompute)
    ends = settings.last_loss or settings.optimizer == "spsa"
    done = yield from descent_steps(
        _gradient(tail, rates, settings),
        tail.value if ends else None,
        delta,
        rates,
        settings.optimizer,
        settings.lr,
        settings.steps,
        settings.clip,
        first,
    )
    return _report(model, done, rates)


def _gradient(tail: Tail, rates: torch.Tensor, settings: Rerouting) -> Gradient:
    if settings.optimizer != "spsa":
        return tail.gradient
    return partial(
        spsa_gradient,
        tail.value,
        free=rates > 0,
        radius=settings.radius,
        pairs=settings.pairs,
        generator=torch.Generator().manual_seed(settings.seed),
    )


def layer_rates(
    model: AdapterModel, surveyed: Survey, settings: Rerouting
) -> torch.Tensor:
    """Return how much of each step every layer takes, [R, L] f32; 0 is not adapted.

    Raises:
        AdapterError: a layer named in the settings is no MoE layer of the model.
    """
    uncertainty = surveyed.uncertainty
    if settings.layers is not None:
        places = _named_places(model, settings)
        return named_choice(uncertainty.shape, places, uncertainty.device).float()
    if settings.choice == "soft":
        return soft_choice(uncertainty, settings.sign)
    return hard_choice(uncertainty, settings.share, settings.sign).float()


def _named_places(model: AdapterModel, settings: Rerouting) -> tuple[int, ...]:
    """Return positions of the layers that the settings name, if any, in MoE layers."""
    known, named = model.shape.layers, settings.layers or ()
    if foreign := set(named) - set(known):
        raise AdapterError(f"layers {sorted(foreign)} are none of {list(known)}")
    return tuple(known.index(layer) for layer in named)


def _report(model: AdapterModel, done: Descent, rates: torch.Tensor) -> list[Round]:
    rounds = []
    chosen = (rates > 0).tolist()
    finite = done.finite.tolist()
    rows = zip(finite, done.delta, done.losses.tolist(), chosen, strict=True)
    for good, delta, losses, used in rows:
        layers = zip(model.shape.layers, used, strict=True)
        rounds.append(
            Round(
                Outcome.ADAPTED if good else Outcome.NON_FINITE,
                delta,
                tuple(losses),
                tuple(number for number, taken in layers if taken),
            )
        )
    return rounds
