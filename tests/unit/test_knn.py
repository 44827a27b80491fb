# SPDX-License-Identifier: Apache-2.0
"""The plan of knn, and what it refuses."""

import dataclasses

import numpy as np
import pytest

from moe_tta import RouterShape
from moe_tta.compile import compile_request
from moe_tta.errors import RequestError
from moe_tta.plan import RoutingPlan
from moe_tta.remix.card import ModelCard
from moe_tta.remix.errors import StoreError
from moe_tta.remix.serving import ServedTokens
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext
from tests.remix.tokens import token_card

SHAPE = RouterShape(
    layers=(1, 2, 5), num_hidden_layers=6, num_experts=6, top_k=2, k_max=4
)


MODEL = ModelCard.of(SHAPE, name="made", weights="00", dtype="float32")


CONTEXT = PlanContext(
    SHAPE,
    stores={
        "solved": ServedTokens(token_card(MODEL, 40, (1, 5)), 1),
        "other": ServedTokens(token_card(MODEL, 5, (1, 2, 5)), 2),
        "broken": StoreError("layer-00001: sha256"),
    },
)


def compiled(value, context=CONTEXT):
    return compile_request(parse(value, presets={}), context)


def test_the_plan_names_memory_and_neighbours():
    body, last, generated = compiled({"knn": {"store": "solved"}}).plans
    assert body is last is generated
    assert body.memory.tolist() == [1, 0, 1]
    assert body.neighbours.tolist() == [8, 0, 8]
    assert list(body.arrays()) == ["memory", "neighbours"]
    plan = compiled({"knn": {"store": "other", "k": 3, "layers": [2, 5]}}).plans[0]
    assert plan.memory.tolist() == [0, 2, 2]
    assert plan.neighbours.tolist() == [0, 3, 3]


def test_spans():
    plans = compiled({"knn": {"store": "solved", "span": "generated"}}).plans
    assert [plan is None for plan in plans] == [True, True, False]


def test_salts_differ_by_store_k_layers_and_span():
    values = [
        {"store": "solved"},
        {"store": "solved", "k": 7},
        {"store": "solved", "layers": [1, 1]},
        {"store": "solved", "span": "prompt"},
        {"store": "other", "k": 5},
    ]
    salts = [compiled({"knn": value}).salt(9, None) for value in values]
    assert len(set(salts)) == 5
    assert None not in salts
    # the last decoder layer feeds no key or value
    last = compiled({"knn": {"store": "solved", "layers": [5, 5]}})
    assert last.salt(9, None) is None
    assert not last.neutral


def test_beside_other_members():
    value = {
        "knn": {"store": "solved"},
        "dynamic_k": {"k": 4},
        "steer": {"bias": [[1, 0, 1.0]]},
    }
    plan = compiled(value).plans[0]
    assert plan.memory.tolist() == [1, 0, 1]
    assert plan.k_max.tolist() == [4] * 3
    assert plan.bias[0, 0] == 1


def test_a_layer_has_one_target():
    given = {"distribution": {"5": [0.5, 0.5, 0, 0, 0, 0]}}
    value = {"knn": {"store": "solved"}, "remix": given}
    words = "remix and knn clash where their spans overlap: a layer has both a target"
    with pytest.raises(RequestError, match=words):
        compiled(value)
    value["knn"]["span"] = "generated"  # the distribution is for the last prompt token
    plans = compiled(value).plans
    assert plans[1].mix is not None
    assert plans[2].memory is not None
    compiled({**value, "knn": {"store": "other", "k": 1, "layers": [1, 2]}})


REFUSED = {
    "unknown": ({"store": "solvd"}, "store", "did you mean 'solved'?"),
    "broken": ({"store": "broken"}, "store", "cannot be used: layer-00001: sha256"),
    "k": ({"store": "other", "k": 6}, "k", "expected 1..5, got 6"),
    "layers": ({"store": "solved", "layers": [2, 5]}, "layers", "holds (1, 5), got"),
    "range": ({"store": "solved", "layers": [3, 4]}, "layers", "range with MoE layers"),
}


@pytest.mark.parametrize(("member", "path", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(member, path, words):
    with pytest.raises(RequestError) as caught:
        compiled({"knn": member})
    assert caught.value.parameter == f"moe_tta.knn.{path}"
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("member", "path"),
    [({}, ".store"), ({"store": "a", "k": 0}, ".k"), ({"store": "a", "k": 65}, ".k")],
)
def test_malformed(member, path):
    with pytest.raises(RequestError) as caught:
        parse({"knn": member}, presets={})
    assert caught.value.parameter == f"moe_tta.knn{path}"


def test_routers_without_a_distribution():
    shape = dataclasses.replace(SHAPE, scoring="sigmoid")
    with pytest.raises(RequestError, match=r"knn\.store: needs a softmax router"):
        compiled(
            {"knn": {"store": "solved"}}, dataclasses.replace(CONTEXT, shape=shape)
        )


def test_operator_stores_are_no_inline_edits():
    spec = parse({"knn": {"store": "solved"}}, presets={})
    assert spec.members["knn"].inline_edits() == ()


def test_plans_go_over_the_wire():
    plan = compiled({"knn": {"store": "solved"}}).plans[0]
    back = RoutingPlan.from_bytes(plan.to_bytes())
    assert back.fingerprint == plan.fingerprint
    np.testing.assert_array_equal(back.memory, plan.memory)
