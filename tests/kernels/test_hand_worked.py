# SPDX-License-Identifier: Apache-2.0
"""Four experts and numbers one can check on paper, for every rule and scoring."""

import math

import numpy as np
import pytest
import torch

from moe_tta.kernels.reference import RoutingRule, route
from moe_tta.plan import Renorm, RoutingPlan, Select
from tests.kernels.cases import (
    LOGITS,
    RTOL,
    SIGMOID,
    SQRTSOFTPLUS,
    check,
    experts,
    make_plan,
    make_shape,
    make_table,
    one,
    routed,
)

RAW = make_shape(renormalize=False)  # weights are p = 0.4, 0.3, 0.2, 0.1


@pytest.mark.parametrize(
    ("rule", "args", "k_min", "k_max", "ids"),
    [
        (Select.MODEL, [0, 0, 0], 1, 4, [0, 1]),
        (Select.TOP_K, [0, 0, 0], 1, 3, [0, 1, 2]),
        (Select.TOP_P, [0.39, 0, 0], 1, 4, [0]),
        (Select.TOP_P, [0.41, 0, 0], 1, 4, [0, 1]),
        (Select.TOP_P, [0.95, 0, 0], 1, 3, [0, 1, 2]),
        (Select.TOP_P, [0.1, 0, 0], 2, 4, [0, 1]),
        (Select.RELATIVE, [0.45, 0, 0], 1, 4, [0, 1, 2]),
        (Select.RELATIVE, [0.8, 0, 0], 1, 4, [0]),
        (Select.RELATIVE, [0.8, 0, 0], 3, 4, [0, 1, 2]),
        (Select.ABSOLUTE, [0.15, 0, 0], 1, 4, [0, 1, 2]),
        (Select.ABSOLUTE, [0.9, 0, 0], 1, 4, [0]),
        (Select.RANKS, [1, 0, 0], 1, 1, [1]),
        (Select.RANKS, [2, 0, 0], 1, 2, [2, 3]),
        # Hn = 1.27985 / 1.38629 = 0.92322
        (Select.ENTROPY, [0.0, 1.0, 0], 1, 4, [0, 1, 2, 3]),
        (Select.ENTROPY, [0.9, 1.0, 0], 1, 4, [0, 1]),
        (Select.ENTROPY, [0.8, 0.8, 0], 1, 4, [0, 1, 2, 3]),
        (Select.ENTROPY, [0.95, 0.95, 0], 1, 4, [0]),
        (Select.SAMPLE, [2, 2, 1.0], 1, 2, [0, 1]),
        (Select.SAMPLE, [2, 3, 1.0], 1, 3, [0, 1, 2]),
    ],
)
def test_selection_rules(rule, args, k_min, k_max, ids):
    plan = make_plan(select=rule, select_args=args, k_min=k_min, k_max=k_max)
    check(one(LOGITS, RAW, plan), ids, [(0.4, 0.3, 0.2, 0.1)[i] for i in ids])


@pytest.mark.parametrize(
    ("rule", "args", "count"),
    [
        (Select.TOP_P, [0.5, 0, 0], 3),  # mass 0.5 does not exceed 0.5
        (Select.RELATIVE, [1, 0, 0], 4),
        (Select.ABSOLUTE, [0.25, 0, 0], 4),
        (Select.ENTROPY, [1, 1, 0], 1),  # a step just above the bound
    ],
)
def test_bounds_met_exactly(rule, args, count):
    plan = make_plan(select=rule, select_args=args, k_max=4)
    assert len(one([0.0] * 4, RAW, plan)[0]) == count


def test_a_run_ends_at_the_first_low_score():
    # ranks by 0.9, 0.78, 0.75, 0.25 are experts 0, 3, 1, 2 with 0.5, 0.2, 0.75, 0.25
    # of 1.7; expert 1 is above the threshold, but behind expert 3
    shape = make_shape(scoring="sigmoid", has_correction_bias=True)
    plan = make_plan(select=Select.ABSOLUTE, select_args=[0.2, 0, 0], k_max=4)
    bias = [0.4, 0.0, 0.0, 0.58]
    assert one(SIGMOID, shape, plan, correction_bias=bias)[0] == [0]


def test_sampling_follows_the_tempered_distribution():
    # one of ranks 1..3 with p = 0.3, 0.2, 0.1 and tau = 1/2: 9, 4, 1 of 14
    plan = make_plan(select=Select.SAMPLE, select_args=[1, 4, 0.5], k_max=2, seed=3)
    count = 4000
    drawn = [ids[1] for ids, _ in routed([LOGITS] * count, RAW, plan)]
    for expert, share in ((1, 9 / 14), (2, 4 / 14), (3, 1 / 14)):
        error = (share * (1 - share) / count) ** 0.5
        assert abs(drawn.count(expert) / count - share) < 4 * error


@pytest.mark.parametrize(
    ("fields", "logits", "bias", "ids", "weights"),
    [
        ({"scoring": "softmax"}, LOGITS, None, [0, 1], [4 / 7, 3 / 7]),
        ({"renormalize": False}, LOGITS, None, [0, 1], [0.4, 0.3]),
        ({"scoring": "topk_softmax"}, LOGITS, None, [0, 1], [4 / 7, 3 / 7]),
        ({}, LOGITS, [0.0, 0.0, 0.0, 0.5], [3, 0], [0.2, 0.8]),
        ({"scoring": "sigmoid"}, SIGMOID, None, [1, 0], [0.6, 0.4]),
        (
            {"scoring": "sigmoid", "renormalize": False, "routed_scaling_factor": 2.5},
            SIGMOID,
            [0.0, 0.0, 0.0, 1.0],  # 0.5, 0.75, 0.25, 1.2
            [3, 1],
            [0.5, 1.875],
        ),
        ({"scoring": "sqrtsoftplus"}, SQRTSOFTPLUS, None, [1, 0], [2 / 3, 1 / 3]),
        (
            {"scoring": "sqrtsoftplus", "routed_scaling_factor": 1.5},
            SQRTSOFTPLUS,
            [0.0, -1.8, 0.0, 0.0],  # 1, 0.2, 0.5, 0.25
            [0, 2],
            [1.0, 0.5],
        ),
    ],
)
def test_scorings(fields, logits, bias, ids, weights):
    shape = make_shape(**fields, has_correction_bias=bias is not None)
    check(one(logits, shape, RoutingPlan(), correction_bias=bias), ids, weights)


def test_ties_go_to_the_lowest_expert():
    assert one([1.0, 2, 2, 2], RAW, RoutingPlan())[0] == [1, 2]


def test_forbidden_experts_leave_the_softmax():
    plan = make_plan(allow=experts(4, 1, 2, 3))
    check(one(LOGITS, RAW, plan), [1, 2], [0.5, 1 / 3])


def test_promote_and_demote_edit_logits():
    # exp: 0.4, 0.3, 0.4 e^0.01, 0.1 and expert 0 at 0.1 e^-0.01
    up, down = 0.4 * math.exp(0.01), 0.1 * math.exp(-0.01)
    plan = make_plan(promote=experts(4, 2), demote=experts(4, 0))
    total = down + 0.3 + up + 0.1
    check(one(LOGITS, RAW, plan), [2, 1], [up / total, 0.3 / total])


def test_promote_reaches_past_forbidden_experts():
    # best allowed is 0.3: the promoted one stands just above it, not above 0.4
    plan = make_plan(allow=~experts(4, 0), promote=experts(4, 3))
    up = 0.3 * math.exp(0.01)
    check(one(LOGITS, RAW, plan), [3, 1], [up / (up + 0.5), 0.3 / (up + 0.5)])


def test_promote_with_correction_bias_keeps_the_weight():
    shape = make_shape(scoring="sigmoid", has_correction_bias=True, renormalize=False)
    plan = make_plan(promote=experts(4, 3), demote=experts(4, 1))
    result = one(SIGMOID, shape, plan, correction_bias=[0.0] * 4)
    check(result, [3, 0], [0.2, 0.5])


def test_target_is_blended():
    plan = make_plan(target=[0, 0, 0, 1], mix=0.5)  # 0.2, 0.15, 0.1, 0.55
    check(one(LOGITS, RAW, plan), [3, 0], [0.55, 0.2])


def test_target_cannot_revive_a_forbidden_expert():
    plan = make_plan(target=[0, 0, 0, 1], mix=0.5, allow=~experts(4, 3))
    check(one(LOGITS, RAW, plan), [0, 1], [2 / 9, 1 / 6])


def test_target_on_a_forbidden_expert_carries_no_entropy():
    # 2/9, 1/6, 1/9 and nothing: Hn = 0.633; with 1/2 on expert 3 it would be 0.883,
    # and 0.765 if the rest were scaled up to 1
    plan = make_plan(
        target=[0, 0, 0, 1],
        mix=0.5,
        allow=~experts(4, 3),
        select=Select.ENTROPY,
        select_args=[0.7, 0.7, 0],
        k_max=3,
    )
    check(one(LOGITS, RAW, plan), [0], [2 / 9])


def test_scale_drop_and_renorm():
    check(one(LOGITS, RAW, make_plan(scale=[0.5, 2, 1, 1])), [0, 1], [0.2, 0.6])
    plan = make_plan(scale=[0.5, 2, 1, 1], renorm=Renorm.ALWAYS)
    check(one(LOGITS, RAW, plan), [0, 1], [0.25, 0.75])
    plan = make_plan(drop=experts(4, 0, 1), renorm=Renorm.ALWAYS)
    check(one(LOGITS, RAW, plan), [0, 1], [0.0, 0.0])
    never = make_plan(renorm=Renorm.NEVER)
    check(one(LOGITS, make_shape(scoring="topk_softmax"), never), [0, 1], [0.4, 0.3])


def test_bias_acts_before_scoring():
    plan = make_plan(bias=[0, 0, 0, math.log(6)])  # 0.4, 0.3, 0.2, 0.6 of 1.5
    check(one(LOGITS, RAW, plan), [3, 0], [0.4, 4 / 15])


def run(logits, plan, width=4):
    """Route one row by a plan that `validate` would refuse."""
    table = make_table(RAW, plan)
    slots = torch.tensor([1])
    rule = RoutingRule.from_shape(RAW)
    return route(torch.tensor([logits]), slots, slots, table.layer(0), rule, width, 0)


def test_unused_columns_repeat_the_first_expert():
    weights, ids = run([*LOGITS, 9.0], RoutingPlan())  # a fifth column is ignored
    assert ids.tolist() == [[0, 1, 0, 0]]
    assert weights[0, 2:].tolist() == [0.0, 0.0]


def test_rows_never_use_more_than_the_allowed_experts():
    every = {"select": Select.TOP_K, "select_args": np.zeros(3), "k_max": 4}
    weights, ids = run(LOGITS, make_plan(**every, allow=experts(4, 1, 2)))
    assert ids.tolist() == [[1, 2, 1, 1]]
    np.testing.assert_allclose(weights[0, :2], [0.6, 0.4], rtol=RTOL)
    weights, ids = run(LOGITS, make_plan(**every, allow=experts(4)))
    assert weights.tolist() == [[0.0] * 4]
    assert ids.min() >= 0
    assert ids.max() < 4
