# SPDX-License-Identifier: Apache-2.0
"""Laws of the strategies and of the compiler that merges them."""

import numpy as np
import pytest

from moe_tta.plan import Renorm, Select
from tests.unit.steering import ARTEFACTS, compiled, plan_of


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"steer": {}},
        {"steer": {"promote": [], "allow": {}}},
        {"steer": {"bias": [[1, 0, 0.0]], "scale": [[1, 0, 1]]}},
        {"steer": {"bias": [[1, 0, -7]], "scale": [[1, 0, 9]], "strength": 0}},
        {"steer": {"mask": "graded", "strength": 0}},
        {"steer": {"allow": {"1": list(range(16))}}},
        {"dynamic_k": {"k": 4}},
        {"renorm": "model"},
    ],
)
def test_neutral_requests(value):
    assert compiled(value).neutral


def test_inline_edits_land_where_they_say():
    plan = plan_of(
        {
            "steer": {
                "promote": [[1, 0]],
                "demote": [[2, 1]],
                "allow": {"3": [4, 5, 6, 7]},
                "bias": [[4, 2, -1.5]],
                "scale": [[4, 3, 0]],
                "drop": [[1, 15]],
            }
        }
    )
    assert np.argwhere(plan.promote).tolist() == [[0, 0]]
    assert np.argwhere(plan.demote).tolist() == [[1, 1]]
    assert np.argwhere(plan.drop).tolist() == [[0, 15]]
    assert plan.allow.sum(axis=1).tolist() == [16, 16, 4, 16]
    assert plan.allow[2, 4:8].all()
    assert plan.bias[3, 2] == -1.5
    assert plan.scale[3, 3] == 0
    assert np.count_nonzero(plan.bias) == np.count_nonzero(plan.scale != 1) == 1


def test_order_and_negative_zero_do_not_change_the_plan():
    one = plan_of({"steer": {"bias": [[1, 0, 2], [1, 1, 3], [1, 2, -0.0]]}})
    two = plan_of({"steer": {"bias": [[1, 1, 3], [1, 0, 2]]}})
    assert one.fingerprint == two.fingerprint


def test_strength_moves_graded_edits_only():
    steer = {"mask": "graded", "promote": [[4, 9]], "strength": 0.5}
    plan = plan_of({"steer": steer})
    assert plan.bias[0, 0] == 1.0
    assert plan.scale[0, 0] == 2.0
    assert plan.promote[3, 9]
    unit = plan_of({"steer": {"mask": "graded", "strength": 1}})
    assert unit.fingerprint == plan_of({"steer": {"mask": "graded"}}).fingerprint


def test_strength_never_makes_a_weight_negative():
    plan = plan_of({"steer": {"scale": [[1, 0, 0.5]], "strength": 3}})
    assert plan.scale[0, 0] == 0


def test_inline_wins_over_the_mask_per_expert():
    steer = {"mask": "graded", "bias": [[1, 0, 7], [1, 1, 1]], "scale": [[3, 5, 1]]}
    plan = plan_of({"steer": steer})
    assert (plan.bias[0, 0], plan.bias[0, 1], plan.bias[2, 5]) == (7, 1, 2)
    assert (plan.scale[0, 0], plan.scale[2, 5]) == (3, 1)
    sets = plan_of({"steer": {"mask": "sets", "allow": {"3": [4, 5, 6, 7]}}})
    assert sets.allow.sum(axis=1).tolist() == [15, 16, 4, 16]
    assert ARTEFACTS["sets"].arrays["allow"].sum() == 62  # the artefact is untouched


def test_layers_limit_the_mask():
    plan = plan_of({"steer": {"mask": "graded", "layers": [2, 4]}})
    assert np.argwhere(plan.bias).tolist() == [[2, 5]]
    assert plan.edited_layers().tolist() == [False, False, True, False]


@pytest.mark.parametrize(
    ("rule", "select", "k_min", "k_max", "arg"),
    [
        ({"k": 1}, Select.TOP_K, None, 1, 0),
        ({"k": 6}, Select.TOP_K, 6, 6, 0),
        ({"p": 0.5}, Select.TOP_P, None, 6, 0.5),
        ({"p": 0, "k_min": 2, "k_max": 3}, Select.TOP_P, 2, 3, 0),
    ],
)
def test_dynamic_k(rule, select, k_min, k_max, arg):
    plan = plan_of({"dynamic_k": {**rule, "layers": [0, 2]}})
    assert plan.select.tolist() == [select, select, 0, 0]
    assert plan.k_max.tolist() == [k_max, k_max, 0, 0]
    assert plan.select_args[:, 0].tolist() == [arg, arg, 0, 0]
    if k_min is None:
        assert plan.k_min is None
    else:
        assert plan.k_min.tolist() == [k_min, k_min, 1, 1]


def test_renorm_fills_every_layer_and_segment():
    value = {"dynamic_k": {"k": 2, "span": "generated"}, "renorm": "always"}
    plans = compiled(value).plans
    assert all((plan.renorm == Renorm.ALWAYS).all() for plan in plans)
    assert [plan.select is None for plan in plans] == [True, True, False]
    assert plan_of({"renorm": "never"}).arrays().keys() == {"renorm"}


@pytest.mark.parametrize(
    ("span", "active"),
    [
        ("all", (1, 1, 1)),
        ("prompt", (1, 1, 0)),
        ("generated", (0, 0, 1)),
        ("last_prompt", (0, 1, 0)),
    ],
)
def test_spans_by_segment(span, active):
    plans = compiled({"dynamic_k": {"k": 2, "span": span}}).plans
    assert tuple(plan is not None for plan in plans) == active


def test_strategies_merge_where_their_spans_overlap():
    steer = {"demote": [[1, 0]], "span": "prompt"}
    value = {"steer": steer, "dynamic_k": {"k": 2, "span": "last_prompt"}}
    body, last, generated = compiled(value).plans
    assert body.arrays().keys() == {"demote"}
    assert last.arrays().keys() >= {"demote", "select", "k_max"}
    assert generated is None
