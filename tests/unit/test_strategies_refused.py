# SPDX-License-Identifier: Apache-2.0
"""What a model's routers cannot honour is refused by its exact parameter."""

import dataclasses

import numpy as np
import pytest

from moe_tta.compile import compile_request
from moe_tta.errors import RequestError
from moe_tta.plan import RoutingPlan
from moe_tta.spec import RequestSpec, parse
from moe_tta.strategies import STRATEGIES, PlanContext, Strategy, StrategyParams
from tests.unit.steering import ARTEFACTS, CONTEXT, SHAPE, compiled, filled, plan_of


def refused(value, context=CONTEXT):
    with pytest.raises(RequestError) as caught:
        compiled(value, context)
    return caught.value


REFUSED = {
    "dense layer": (
        {"steer": {"promote": [[1, 0], [0, 3]]}},
        "moe_tta.steer.promote[1]",
        "expected an MoE layer of this model (1-4), got 0",
    ),
    "no layer": (
        {"steer": {"bias": [[10**30, 0, 1]]}},
        "moe_tta.steer.bias[0]",
        "expected an MoE layer",
    ),
    "no expert": (
        {"steer": {"drop": [[1, 16]]}},
        "moe_tta.steer.drop[0]",
        "expected an expert 0..15, got 16",
    ),
    "negative expert": (
        {"steer": {"drop": [[1, -1]]}},
        "moe_tta.steer.drop[0]",
        "got -1",
    ),
    "no allowed expert": (
        {"steer": {"allow": {"1": [0, 1, 2, 16]}}},
        "moe_tta.steer.allow.1[3]",
        "expected an expert 0..15, got 16",
    ),
    "no allowed layer": (
        {"steer": {"allow": {"9": [0]}}},
        "moe_tta.steer.allow.9",
        "expected an MoE layer",
    ),
    "too few allowed": (
        {"steer": {"allow": {"2": [0, 1, 2]}}},
        "moe_tta.steer.allow",
        "layer 2: 3 experts stay allowed, expected at least 4",
    ),
    "none allowed": (
        {"steer": {"allow": {"2": []}}},
        "moe_tta.steer.allow",
        "0 experts stay allowed",
    ),
    "both ways": (
        {"steer": {"promote": [[2, 3]], "demote": [[2, 3]]}},
        "moe_tta.steer.promote",
        "layer 2 expert 3 is both promoted and demoted",
    ),
    "both ways with the mask": (
        {"steer": {"mask": "sets", "demote": [[1, 0]]}},
        "moe_tta.steer.mask",
        "is both promoted and demoted",
    ),
    "too many promoted": (
        {"steer": {"promote": [[2, e] for e in range(5)]}},
        "moe_tta.steer.promote",
        "layer 2: expected at most 4 promoted experts",
    ),
    "promoted but not allowed": (
        {"steer": {"promote": [[1, 9]], "allow": {"1": [0, 1, 2, 3]}}},
        "moe_tta.steer",
        "promoted but not allowed",
    ),
    "nothing graded": (
        {"steer": {"promote": [[1, 0]], "strength": 1}},
        "moe_tta.steer.strength",
        "have no degree",
    ),
    "too strong": (
        {"steer": {"mask": "heavy", "strength": 2}},
        "moe_tta.steer.strength",
        "takes bias to 18000, expected at most 10000",
    ),
    "outside layers": (
        {"steer": {"drop": [[3, 0]], "layers": [1, 2]}},
        "moe_tta.steer.drop[0]",
        "outside the request's own layers",
    ),
    "layers backwards": (
        {"steer": {"layers": [3, 2]}},
        "moe_tta.steer.layers",
        "expected 0 <= first <= last <= 4, got [3, 2]",
    ),
    "layers without experts": (
        {"dynamic_k": {"k": 2, "layers": [0, 0]}},
        "moe_tta.dynamic_k.layers",
        "expected a range with MoE layers (1-4)",
    ),
    "mask": (
        {"steer": {"mask": "grade"}},
        "moe_tta.steer.mask",
        "did you mean 'graded'? known: graded, heavy, sets",
    ),
    "k": (
        {"dynamic_k": {"k": 7}},
        "moe_tta.dynamic_k.k",
        "expected 1..6, got 7; this engine was built for at most 6 experts",
    ),
    "k_max": (
        {"dynamic_k": {"p": 0.5, "k_max": 7}},
        "moe_tta.dynamic_k.k_max",
        "the operator can raise the engine option k_max",
    ),
    "k_min": (
        {"dynamic_k": {"p": 0.5, "k_min": 4, "k_max": 3}},
        "moe_tta.dynamic_k.k_min",
        "expected k_min <= k_max = 3, got 4",
    ),
    "clash of two": (
        {"steer": {"allow": {"1": [0, 1, 2, 3]}}, "dynamic_k": {"k": 5}},
        "moe_tta",
        "steer and dynamic_k clash where their spans overlap: layer 1: 4 experts",
    ),
}


@pytest.mark.parametrize(("value", "parameter", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_by_the_model(value, parameter, words):
    error = refused(value)
    assert error.parameter == parameter
    assert words in error.message


def test_fewer_experts_need_fewer_allowed():
    value = {"steer": {"allow": {"1": [0, 1]}}, "dynamic_k": {"k": 2}}
    assert plan_of(value).allow[0].sum() == 2
    value["dynamic_k"]["span"] = "generated"
    assert refused(value).parameter == "moe_tta.steer.allow"


def test_mask_of_another_model():
    other = dataclasses.replace(SHAPE, num_experts=32)
    error = refused({"steer": {"mask": "sets"}}, PlanContext(other, ARTEFACTS))
    assert error.parameter == "moe_tta.steer.mask"
    assert "num_experts 16 != 32" in error.message


def test_strategies_that_set_one_field_clash(monkeypatch):
    steer = parse({"steer": {"demote": [[1, 3]], "span": "prompt"}}, presets={})

    def plan(params, context):
        return RoutingPlan(demote=filled(np.bool_, True, False))

    monkeypatch.setitem(STRATEGIES, "other", Strategy("other", StrategyParams, plan))
    members = {**steer.members, "other": StrategyParams(span="last_prompt")}
    with pytest.raises(RequestError, match="steer and other clash where their spans"):
        compile_request(RequestSpec(members), CONTEXT)
    members["other"] = StrategyParams(span="generated")
    assert None not in compile_request(RequestSpec(members), CONTEXT).plans
