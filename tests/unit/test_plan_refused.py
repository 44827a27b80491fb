# SPDX-License-Identifier: Apache-2.0
"""Which plans a model refuses, and with what words."""

import dataclasses
import itertools
import re

import numpy as np
import pytest

from moe_tta.plan import PlanError, RoutingPlan, Select
from tests.unit.test_plan import (
    GROUPED,
    SHAPE,
    E,
    L,
    counting,
    experts,
    per_layer,
)


def recalling(memory=1, neighbours=1):
    return RoutingPlan(
        memory=per_layer("memory", memory),
        neighbours=per_layer("neighbours", neighbours),
    )


@pytest.mark.parametrize(
    ("shape", "plan", "message"),
    [
        (
            SHAPE,
            RoutingPlan(bias=np.zeros((L, E + 1), np.float32)),
            "bias has shape (3, 9), expected (3, 8)",
        ),
        (
            SHAPE,
            RoutingPlan(mix=np.zeros((L, E), np.float32)),
            "mix has shape (3, 8), expected (3,)",
        ),
        (
            SHAPE,
            dataclasses.replace(counting(1), select_args=np.zeros((L, 2), np.float32)),
            "select_args has shape (3, 2), expected (3, 3)",
        ),
        (
            SHAPE,
            RoutingPlan(bias=np.zeros((L, E))),
            "bias is float64, expected float32",
        ),
        (
            SHAPE,
            counting(99),
            "select holds a code that is none of",
        ),
        (
            SHAPE,
            RoutingPlan(renorm=np.full(L, 3, np.int32)),
            "renorm holds a code that is none of",
        ),
        (
            SHAPE,
            RoutingPlan(target=per_layer("target", 0.1)),
            "target needs mix",
        ),
        (
            SHAPE,
            RoutingPlan(k_max=np.ones(L, np.int32)),
            "k_min and k_max need select",
        ),
        (
            SHAPE,
            counting(Select.RANKS, 2, args=(1.5, 0, 0)),
            "the first rank must be a whole number",
        ),
        (
            SHAPE,
            RoutingPlan(scale=per_layer("scale", np.nan)),
            "scale holds values that are not finite",
        ),
        (
            SHAPE,
            RoutingPlan(bias=per_layer("bias", np.inf)),
            "bias holds values that are not finite",
        ),
        (
            SHAPE,
            RoutingPlan(promote=experts(1), demote=experts(1, 2)),
            "an expert is both promoted and demoted",
        ),
        (
            SHAPE,
            RoutingPlan(promote=experts(1), allow=~experts(1, layer=2)),
            "an expert is promoted but not allowed",
        ),
        (
            GROUPED,
            RoutingPlan(promote=experts(0, 2, 4, layer=1)),
            "layer 2: promoted experts lie in 3 groups, but a token uses 2 of 4",
        ),
        (
            SHAPE,
            RoutingPlan(scale=per_layer("scale", -1)),
            "scale holds a negative factor, expected >= 0",
        ),
        (
            SHAPE,
            RoutingPlan(allow=~experts(*range(7), layer=2)),
            "layer 5: 1 experts stay allowed, expected at least 2",
        ),
        (
            SHAPE,
            dataclasses.replace(counting(Select.TOP_K, 3), allow=experts(0, 1)),
            "layer 1: 2 experts stay allowed, expected at least 3",
        ),
        (
            GROUPED,
            dataclasses.replace(
                counting(Select.TOP_K, 3), allow=~experts(0, 2, layer=1)
            ),
            "layer 2: 2 experts stay allowed in the 2 groups a token may be given, "
            "expected at least 3",
        ),
        (
            GROUPED,
            counting(Select.RANKS, 1, args=(4, 0, 0)),
            "layer 1: 4 experts stay allowed in the 2 groups a token may be given, "
            "expected at least 5",
        ),
        (
            dataclasses.replace(SHAPE, scoring="sigmoid", has_correction_bias=True),
            RoutingPlan(mix=per_layer("mix", 1), target=per_layer("target", 0.125)),
            "target and mix need a softmax router without correction bias; this model "
            "scores with sigmoid and a correction bias",
        ),
        (
            SHAPE,
            RoutingPlan(mix=per_layer("mix", 1.5), target=per_layer("target", 0.125)),
            "mix must lie in [0, 1]",
        ),
        (
            SHAPE,
            RoutingPlan(mix=per_layer("mix", 1)),
            "target must hold probabilities >= 0 where mix > 0",
        ),
        (
            SHAPE,
            RoutingPlan(mix=per_layer("mix", 1), target=per_layer("target", 0.1)),
            "target must sum to 1 over experts where mix > 0",
        ),
        (
            SHAPE,
            RoutingPlan(neighbours=per_layer("neighbours", 1)),
            "neighbours needs memory",
        ),
        (
            SHAPE,
            RoutingPlan(memory=per_layer("memory", 1)),
            "neighbours must lie in 1..64 where memory is used",
        ),
        (SHAPE, recalling(neighbours=0), "neighbours must lie in 1..64"),
        (SHAPE, recalling(neighbours=65), "neighbours must lie in 1..64"),
        (SHAPE, recalling(memory=-1), "memory must be a place from 1, or 0 for none"),
        (
            SHAPE,
            dataclasses.replace(
                recalling(),
                mix=per_layer("mix", 0.5),
                target=per_layer("target", 0.125),
            ),
            "a layer has both a target and a memory to look one up in",
        ),
        (
            dataclasses.replace(SHAPE, scoring="sigmoid"),
            recalling(),
            "memory needs a softmax router without correction bias",
        ),
        (
            SHAPE,
            RoutingPlan(select=per_layer("select", Select.TOP_K), allow=experts(0, 1)),
            "select needs k_max and select_args",
        ),
        (
            SHAPE,
            counting(Select.TOP_K, 5),
            "selected counts must satisfy 1 <= k_min <= k_max <= 4 (the engine's "
            "k_max)",
        ),
        (SHAPE, counting(Select.TOP_P, 2, 3), "selected counts must satisfy"),
        (SHAPE, counting(Select.TOP_P, 2, 0), "selected counts must satisfy"),
        (SHAPE, counting(Select.RANKS, 2, args=(7, 0, 0)), "ranks must lie in 0..7"),
        (SHAPE, counting(Select.RANKS, 2, args=(-1, 0, 0)), "ranks must lie in 0..7"),
        (
            SHAPE,
            counting(Select.ENTROPY, args=(0.6, 0.5, 0)),
            "entropy bounds must satisfy low <= high",
        ),
        (
            SHAPE,
            counting(Select.SAMPLE, args=(3, 8, 1)),
            "sampling must satisfy 0 <= keep <= k_max <= pool",
        ),
        (SHAPE, counting(Select.SAMPLE, args=(1, 1, 1)), "sampling must satisfy"),
        (SHAPE, counting(Select.SAMPLE, args=(-1, 8, 1)), "sampling must satisfy"),
        (
            SHAPE,
            counting(Select.SAMPLE, args=(1, 8, 0)),
            "sampling temperature tau must be > 0",
        ),
    ],
)
def test_refusals_say_why(shape, plan, message):
    with pytest.raises(PlanError, match=re.escape(message)):
        plan.validate(shape)


@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        (SHAPE, recalling(9, 64)),
        (SHAPE, counting(Select.RANKS, 2, args=(6, 0, 0))),
        (SHAPE, counting(Select.SAMPLE, args=(2, 2, 0.1))),
        (SHAPE, counting(Select.ENTROPY, 4, args=(0.5, 0.5, 0))),
        (SHAPE, counting(Select.MODEL, 0, args=(9, -9, 0))),
        (GROUPED, RoutingPlan(promote=experts(0, 1, 2, 3))),
        (GROUPED, RoutingPlan(allow=~experts(0, 2))),
        (SHAPE, RoutingPlan(target=per_layer("target", 0.1), mix=np.zeros(L, "f4"))),
    ],
)
def test_limits_themselves_are_valid(shape, plan):
    plan.validate(shape)


@pytest.mark.parametrize("shape", [SHAPE, GROUPED])
def test_too_few_allowed_in_the_worst_groups(shape):
    rng = np.random.default_rng(0)
    groups, chosen = shape.num_expert_group, shape.topk_group
    for _ in range(300):
        allow = rng.random((L, E)) < rng.random((L, 1))
        fewest = []
        for row in allow.reshape(L, groups, -1).sum(axis=2):
            filled = [count for count in row if count]
            picks = itertools.combinations(filled, min(chosen, len(filled)))
            fewest.append(min(sum(pick) for pick in picks))
        short = [n for n, count in enumerate(fewest) if count < shape.top_k]
        plan = RoutingPlan(allow=allow)
        if not short:
            plan.validate(shape)
            continue
        words = f"layer {shape.layers[short[0]]}: {fewest[short[0]]} experts stay"
        with pytest.raises(PlanError, match=words):
            plan.validate(shape)
