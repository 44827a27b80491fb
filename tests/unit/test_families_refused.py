# SPDX-License-Identifier: Apache-2.0
"""What the routers of each family cannot honour is refused by its exact parameter."""

import dataclasses

import numpy as np
import pytest

from moe_tta.compile import compile_request
from moe_tta.errors import RequestError
from moe_tta.plan import RoutingPlan
from moe_tta.spec import RequestSpec, parse
from moe_tta.strategies import STRATEGIES, PlanContext, Strategy, StrategyParams
from tests.families import CASES

BY_NAME = {case.name: case.shape for case in CASES}
GROUPED = [name for name, shape in BY_NAME.items() if shape.grouped]
SIGMOID = [name for name, shape in BY_NAME.items() if not shape.is_distribution]
# a row of three groups, where a token uses two of four
THREE_GROUPS = [[2, 0], [2, 4], [2, 8]]


def refused(name, value):
    with pytest.raises(RequestError) as caught:
        compile_request(parse(value, presets={}), PlanContext(BY_NAME[name]))
    return caught.value


def test_there_are_such_families():
    assert GROUPED == ["deepseek_v2", "deepseek_v3"]
    assert SIGMOID == ["deepseek_v3", "glm4_moe"]


@pytest.mark.parametrize("name", GROUPED)
def test_promoted_in_too_many_groups(name):
    error = refused(name, {"steer": {"promote": THREE_GROUPS}})
    assert error.parameter == "moe_tta.steer.promote"
    assert "lie in 3 groups, but a token uses 2 of 4" in error.message


@pytest.mark.parametrize("name", GROUPED)
def test_too_few_allowed_in_groups(name):
    error = refused(name, {"steer": {"allow": {"2": [0, 4, 8, 12]}}})
    assert error.parameter == "moe_tta.steer.allow"
    assert "2 experts stay allowed in the 2 groups" in error.message


@pytest.mark.parametrize("name", BY_NAME)
def test_ungrouped_families_take_both(name):
    shape = BY_NAME[name]
    if shape.grouped:
        return
    layer = str(shape.layers[-1])
    value = {"steer": {"allow": {layer: list(range(shape.top_k))}}}
    compile_request(parse(value, presets={}), PlanContext(shape))


@pytest.mark.parametrize("name", BY_NAME)
def test_target_needs_a_distribution(monkeypatch, name):
    shape = BY_NAME[name]
    size = (len(shape.layers), shape.num_experts)

    def plan(params, context):
        target = np.full(size, 1 / shape.num_experts, np.float32)
        return RoutingPlan(target=target, mix=np.ones(size[0], np.float32))

    monkeypatch.setitem(STRATEGIES, "blend", Strategy("blend", StrategyParams, plan))
    spec = RequestSpec({"blend": StrategyParams()})
    if shape.is_distribution:
        assert compile_request(spec, PlanContext(shape)).plans[0].mix.all()
        return
    with pytest.raises(RequestError) as caught:
        compile_request(spec, PlanContext(shape))
    assert caught.value.parameter == "moe_tta.blend"
    assert "need a softmax router without correction bias" in caught.value.message


@pytest.mark.parametrize("name", GROUPED)
def test_more_experts_than_groups_hold(name):
    shape = dataclasses.replace(BY_NAME[name], k_max=12)
    with pytest.raises(RequestError) as caught:
        compile_request(parse({"dynamic_k": {"k": 12}}, presets={}), PlanContext(shape))
    assert caught.value.parameter.startswith("moe_tta.dynamic_k")
    assert "expected at least 12" in caught.value.message
