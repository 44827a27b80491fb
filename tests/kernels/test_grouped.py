# SPDX-License-Identifier: Apache-2.0
"""Choice of groups, with four experts in two groups of which a token uses one."""

import math

from moe_tta.plan import RoutingPlan
from tests.kernels.cases import SIGMOID, check, experts, make_plan, make_shape, one

GROUPED = {"num_expert_group": 2, "topk_group": 1, "renormalize": False}


def test_grouped_softmax_takes_the_group_of_the_best():
    logits = [math.log(p) for p in (0.4, 0.05, 0.3, 0.25)]
    check(one(logits, make_shape(**GROUPED), RoutingPlan()), [0, 1], [0.4, 0.05])


def test_grouped_bias_takes_the_group_of_the_best_pair():
    shape = make_shape(**GROUPED, scoring="sigmoid", has_correction_bias=True)
    bias = [0.0, 0.0, 0.3, 0.5]  # 0.5 + 0.75 against 0.55 + 0.7
    near = [0.0, 0.0, 0.3, 0.49]
    check(one(SIGMOID, shape, RoutingPlan(), correction_bias=near), [1, 0], [0.75, 0.5])
    bias[3] = 0.51
    check(one(SIGMOID, shape, RoutingPlan(), correction_bias=bias), [3, 2], [0.2, 0.25])


def test_grouped_edges():
    shape = make_shape(
        **GROUPED, scoring="sigmoid", has_correction_bias=True, top_k=1, k_max=2
    )
    zeros = [0.0] * 4
    # one expert left in the first group counts alone: 0.75 against 0.25 + 0.2
    plan = make_plan(allow=~experts(4, 0))
    check(one(SIGMOID, shape, plan, correction_bias=zeros), [1], [0.75])
    # an empty group is never chosen, a promoted expert's group always
    plan = make_plan(allow=experts(4, 2, 3))
    check(one(SIGMOID, shape, plan, correction_bias=zeros), [2], [0.25])
    plan = make_plan(promote=experts(4, 3))
    check(one(SIGMOID, shape, plan, correction_bias=zeros), [3], [0.2])
    # equal groups: the lowest id
    check(one(zeros, shape, RoutingPlan(), correction_bias=zeros), [0], [0.5])
