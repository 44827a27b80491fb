# SPDX-License-Identifier: Apache-2.0
"""One setting at a time, away from the published ones: for the tuning part."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

from benchmarks.quality.arms import PLAIN, Arm
from benchmarks.quality.remix import updates
from benchmarks.quality.remix.batch import Batch
from benchmarks.quality.remix.likelihoods import (
    Scores,
    log_likelihoods_at,
    log_likelihoods_from_last_prompt_token,
    prompt_of,
)
from benchmarks.quality.remix.methods import Method, given, scored
from benchmarks.quality.remix.study import Study
from moe_tta.adapter import GradientDescent
from moe_tta.remix.lookup import LookUp
from moe_tta.remix.weights import KERNELS

NEIGHBOURS = (1, 5)
LAYERS = (1, 10)
RATES = (0.1, 1.0, 10.0)
ALL_STEPS = (3, 20)
CORE_SHARE = 20 / 64  # C3PO's core experts, of OLMoE's and DeepSeekMoE's


def variants(study: Study, steps: int, lr: float) -> dict[Arm, Method]:
    """Return the arms, the plain model and the unchanged methods first.

    Args:
        study: Holds the settings that are varied.
        steps: Of gradient descent.
        lr: Of its first step.
    """
    experts = study.store.card.model.num_experts
    every = GradientDescent(steps=steps, lr=lr, core=experts)
    found = {
        PLAIN: scored(updates.own),
        given("regression"): scored(updates.regression),
        given("NGD"): scored(updates.descent(every)),
        given("oracle"): scored(updates.oracle(every)),
        given("random references NGD"): scored(updates.random_descent(every)),
        given("regression alpha=0.5"): scored(updates.blended(0.5)),
        given("regression span=last_prompt+generated"): _generated_too,
        given("regression position=first"): _at(0.0),
        given("regression position=middle"): _at(0.5),
    }
    found |= _by_neighbours(study, every) | _by_layers(study, every)
    return found | _by_rule(every)


def _by_neighbours(study: Study, every: GradientDescent) -> dict[Arm, Method]:
    found = {}
    for k in NEIGHBOURS:
        how = replace(study.look_up, k=k)
        found[given(f"regression k={k}")] = scored(_regression(how))
        found[given(f"NGD k={k}")] = scored(_descent(how, every))
    for kernel in KERNELS:
        if kernel != study.look_up.kernel:
            update = _regression(replace(study.look_up, kernel=kernel))
            found[given(f"regression kernel={kernel}")] = scored(update)
    return found


def _regression(how: LookUp) -> updates.Update:
    return lambda batch: batch.neighbours(how).mean


def _descent(how: LookUp, rule: GradientDescent) -> updates.Update:
    return lambda batch: updates.descended(batch.neighbours(how).tail, batch.own, rule)


def _by_layers(study: Study, every: GradientDescent) -> dict[Arm, Method]:
    all_layers = study.model.shape.layers
    found = {}
    for count in (*LAYERS, len(all_layers)):
        if count <= len(all_layers):
            within = _within(all_layers[-count:])
            found |= {
                given(f"regression layers={count}"): within(updates.regression),
                given(f"oracle layers={count}"): within(updates.oracle(every)),
            }
    return found


def _within(layers: tuple[int, ...]) -> Callable[[updates.Update], Method]:
    """Methods that cover other layers; they share what is cached of a batch."""

    @lru_cache(maxsize=1)
    def other(batch: Batch) -> Batch:
        return Batch(replace(batch.study, layers=layers), batch.questions)

    return lambda update: lambda batch: scored(update)(other(batch))


def _by_rule(every: GradientDescent) -> dict[Arm, Method]:
    core = math.ceil(every.core * CORE_SHARE)
    changes = [{"lr": lr} for lr in RATES] + [{"steps": n} for n in ALL_STEPS]
    rules = {_name(change): replace(every, **change) for change in changes}
    rules[f"core={core}"] = replace(every, core=core)
    descents = {
        given(f"NGD {name}"): scored(updates.descent(rule))
        for name, rule in rules.items()
    }
    oracles = {
        given(f"oracle {name}"): scored(updates.oracle(rule))
        for name, rule in rules.items()
    }
    return descents | oracles


def _name(change: dict[str, float]) -> str:
    return ", ".join(f"{key}={value}" for key, value in change.items())


def _generated_too(batch: Batch) -> Scores:
    return log_likelihoods_from_last_prompt_token(
        batch.study.model, batch.encoded, batch.study.layers, batch.nearest.mean
    )


def _at(share: float) -> Method:
    """Kernel regression at the token before which this share of the prompt stands."""

    def method(batch: Batch) -> Scores:
        prompts = [prompt_of(question) for question in batch.encoded]
        places = [int(share * len(prompt)) for prompt in prompts]
        omega = batch.nearest.mean_at(share)
        study = batch.study
        return log_likelihoods_at(
            study.model, batch.encoded, places, study.layers, omega
        )

    return method
