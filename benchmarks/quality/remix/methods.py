# SPDX-License-Identifier: Apache-2.0
"""The arms: from a batch of questions to their choices' scores.

Each update gives the last prompt tokens' distributions; the choices are then scored
under them. `IN_CONTEXT` changes the prompt instead.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.quality.arms import PLAIN, Arm
from benchmarks.quality.packing import encode
from benchmarks.quality.remix.batch import Batch
from benchmarks.quality.remix.likelihoods import Scores, plain_log_likelihoods
from benchmarks.quality.tasks.question import ChoiceQuestion
from moe_tta.adapter import (
    GradientDescent,
    NeighbourTail,
    descend_neighbours,
    search_alpha,
)
from moe_tta.remix.offline import find_mode

Method = Callable[[Batch], Scores]
Update = Callable[[Batch], torch.Tensor]  # [Q, layers, E] f32

# what a request would carry; the distribution is another one for every question
GIVEN = {"remix": {"distribution": "computed for each question"}}


def all_methods(num_experts: int, steps: int, lr: float) -> dict[Arm, Method]:
    """Return the arms, the plain model first.

    Args:
        num_experts: Of a layer. The core is an arm of its own where it is smaller.
        steps: Of gradient descent.
        lr: Of its first step.
    """
    every = GradientDescent(steps=steps, lr=lr, core=num_experts)
    core = GradientDescent(steps=steps, lr=lr)
    updates: dict[str, Update] = {
        "regression alpha=0": lambda batch: batch.nearest.mean,
        "regression alpha searched": _searched,
        "mode finding": _mode,
        "NGD": lambda batch: _descended(batch.nearest.tail, batch.own, every),
    }
    if core.core < num_experts:
        updates[f"NGD core={core.core}"] = lambda batch: _descended(
            batch.nearest.tail, batch.own, core
        )
    updates |= {
        "random references regression": lambda batch: batch.random.mean,
        "random references NGD": lambda batch: _descended(
            batch.random.tail, batch.own, every
        ),
        "oracle": lambda batch: _descended(batch.labels, batch.own, every),
    }
    overrides = {Arm(name, name, GIVEN): _scored(u) for name, u in updates.items()}
    plain = {PLAIN: _scored(lambda batch: batch.own)}
    return plain | {Arm("in context", "in context", {}): in_context} | overrides


def in_context(batch: Batch) -> Scores:
    """Score the choices after the neighbours' questions and answers, nearest last."""
    prompted = []
    for question, solved in zip(batch.questions, batch.nearest.questions, strict=True):
        head = "".join(f"{one.prompt} {one.label}\n\n" for one in reversed(solved))
        contexts = tuple(head + context for context in question.contexts)
        longer = ChoiceQuestion(question.id, contexts, question.choices, question.gold)
        prompted.append(encode(batch.study.tokenizer, longer))
    model = batch.study.model
    return [plain_log_likelihoods(model, [one])[0] for one in prompted]


def _scored(update: Update) -> Method:
    return lambda batch: batch.choices.log_likelihoods(update(batch))


def _searched(batch: Batch) -> torch.Tensor:
    return search_alpha(batch.nearest.tail, batch.own, batch.nearest.mean).omega


def _mode(batch: Batch) -> torch.Tensor:
    study = batch.study
    modes = [
        find_mode(
            study.store,
            own,
            study.layers,
            k=study.look_up.k,
            kernel=study.look_up.kernel,
        )
        for own in batch.own.cpu().numpy()
    ]
    return torch.from_numpy(np.stack(modes).astype(np.float32))


def _descended(
    tail: NeighbourTail, own: torch.Tensor, settings: GradientDescent
) -> torch.Tensor:
    done = descend_neighbours(tail, own, settings)
    if not done.finite.all():
        raise FloatingPointError("gradient descent on the answers' loss: not finite")
    return done.omega
