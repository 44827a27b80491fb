# SPDX-License-Identifier: Apache-2.0
"""The arms: from a batch of questions to their choices' scores.

Each update gives the last prompt tokens' distributions; the choices are then scored
under them. `in_context` changes the prompt instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from benchmarks.quality.arms import PLAIN, Arm
from benchmarks.quality.packing import encode, packs
from benchmarks.quality.remix import updates
from benchmarks.quality.remix.batch import Batch
from benchmarks.quality.remix.likelihoods import (
    PACK_TOKENS,
    Scores,
    plain_log_likelihoods,
)
from benchmarks.quality.tasks.question import ChoiceQuestion
from moe_tta.adapter import GradientDescent

Method = Callable[[Batch], Scores]

# what a request would carry; the distribution is another one for every question
GIVEN = {"remix": {"distribution": "computed for each question"}}


def all_methods(
    num_experts: int, steps: int, lr: float, more_rates: Sequence[float] = ()
) -> dict[Arm, Method]:
    """Return the arms, the plain model first.

    Args:
        num_experts: Of a layer. The core is an arm of its own where it is smaller.
        steps: Of gradient descent.
        lr: Of its first step.
        more_rates: First steps at which it is tried, too.
    """
    every = GradientDescent(steps=steps, lr=lr, core=num_experts)
    core = GradientDescent(steps=steps, lr=lr)
    found = {
        PLAIN: scored(updates.own),
        Arm("in context", "in context", {}): in_context,
        given("regression alpha=0"): scored(updates.regression),
        given("regression alpha searched"): scored(updates.searched),
        given("mode finding"): scored(updates.mode),
        given("NGD"): scored(updates.descent(every)),
    }
    if core.core < num_experts:
        found[given(f"NGD core={core.core}")] = scored(updates.descent(core))
    found |= {
        given("random references regression"): scored(updates.random_regression),
        given("oracle"): scored(updates.oracle(every)),
    }
    for rate in more_rates:
        found |= _descents(replace(every, lr=rate))
    return found


def _descents(rule: GradientDescent) -> dict[Arm, Method]:
    descents = {
        "NGD": updates.descent(rule),
        "random references NGD": updates.random_descent(rule),
        "oracle": updates.oracle(rule),
    }
    return {
        given(f"{name} lr={rule.lr}"): scored(update)
        for name, update in descents.items()
    }


def given(name: str) -> Arm:
    """An arm whose requests carry a distribution."""
    return Arm(name, name, GIVEN)


def scored(update: updates.Update) -> Method:
    """Score choices under an update's distributions at the last prompt token."""
    return lambda batch: batch.choices.log_likelihoods(update(batch))


def in_context(batch: Batch) -> Scores:
    """Score choices after the neighbours' questions and answers, the nearest last."""
    prompted = []
    for question, solved in zip(batch.questions, batch.nearest.questions, strict=True):
        head = "".join(f"{one.prompt} {one.label}\n\n" for one in reversed(solved))
        contexts = tuple(head + context for context in question.contexts)
        longer = ChoiceQuestion(question.id, contexts, question.choices, question.gold)
        prompted.append(encode(batch.study.tokenizer, longer))
    scores: Scores = []
    model = batch.study.model
    for group in packs(prompted, PACK_TOKENS[model.device.type]):  # in their order
        some = [prompted[index] for index in group]
        scores += plain_log_likelihoods(model, some)
    return scores
