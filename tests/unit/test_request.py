# SPDX-License-Identifier: Apache-2.0
"""The client helper, the prefix-cache salt and the wire form."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest

import moe_tta
from moe_tta.compile import compile_request
from moe_tta.compiled import SALT_PREFIX, check_client_salt
from moe_tta.errors import RequestError
from moe_tta.plan import RoutingPlan
from moe_tta.shape import RouterShape
from moe_tta.spans import SEGMENTS
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext

SHAPE = RouterShape(
    layers=(1, 2, 3), num_hidden_layers=4, num_experts=8, top_k=2, k_max=4
)
DENSE_END = RouterShape(
    layers=(1, 2, 3), num_hidden_layers=5, num_experts=8, top_k=2, k_max=4
)


def compiled(value, shape=SHAPE):
    return compile_request(parse(value, presets={}), PlanContext(shape))


def test_helper_builds_every_form():
    made = moe_tta.request(steer={"allow": {3: np.array([1, 2])}}, renorm="never")
    value = {"steer": {"allow": {"3": [1, 2]}}, "renorm": "never"}
    assert made.extra_args == {"moe_tta": value}
    assert made.vllm_xargs.keys() == {"moe_tta"}
    assert json.loads(made.vllm_xargs["moe_tta"]) == value
    assert made.extra_body == {"vllm_xargs": made.vllm_xargs}
    assert parse(made.vllm_xargs["moe_tta"], presets={}) == parse(value, presets={})


def test_helper_names_a_preset():
    made = moe_tta.request(preset="calm")
    assert made.extra_args == made.vllm_xargs == {"moe_tta": "calm"}


@pytest.mark.parametrize(
    ("members", "parameter"),
    [
        ({"ster": {}}, "moe_tta.ster"),
        ({"dynamic_k": {"k": True}}, "moe_tta.dynamic_k.k"),
        ({"dynamic_k": {"k": 1}, "preset": "calm"}, "moe_tta"),
        ({"preset": "no such name"}, "moe_tta"),
        ({"preset": 3}, "moe_tta"),
    ],
)
def test_helper_refuses_on_the_client(members, parameter):
    with pytest.raises(RequestError) as caught:
        moe_tta.request(**members)
    assert caught.value.parameter == parameter


def test_import_is_light():
    code = "import sys, moe_tta; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not {"numpy", "pydantic", "torch", "vllm"} & set(loaded.split())
    code = "import sys, moe_tta.compile, moe_tta.settings, moe_tta; "
    code += "moe_tta.request(); print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "vllm"} & set(loaded.split())


def test_public_names():
    assert moe_tta.RouterShape is RouterShape
    assert moe_tta.__version__.count(".") == 2
    assert {name for name in moe_tta.__all__ if hasattr(moe_tta, name)} == set(
        moe_tta.__all__
    )
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        moe_tta.nothing  # noqa: B018


SPANS = ("all", "prompt", "generated", "last_prompt")
LAST_ONLY = {"steer": {"demote": [[3, 0]]}}
LAST_K = {"dynamic_k": {"k": 1, "layers": [3, 3]}}


@pytest.mark.parametrize("value", [{}, {"dynamic_k": {"k": 2}}, LAST_ONLY, LAST_K])
def test_no_salt_where_kv_stays_the_models(value):
    assert compiled(value).salt(9, None) is None
    assert compiled(value).salt(9, "mine") is None


@pytest.mark.parametrize("value", [LAST_ONLY, LAST_K])
def test_a_dense_last_layer_sees_the_edit(value):
    assert compiled(value, DENSE_END).salt(9, None) is not None


def test_salt_form():
    salt = compiled({"renorm": "always"}).salt(9, None)
    assert salt.startswith(SALT_PREFIX)
    assert len(salt) == len(SALT_PREFIX) + 40
    int(salt.removeprefix(SALT_PREFIX), 16)


def test_equal_plans_share_kv():
    one = compiled({"steer": {"demote": [[1, 0], [2, 1]]}})
    two = compiled({"steer": {"demote": [[2, 1], [1, 0]], "layers": [0, 3]}})
    assert one.salt(9, None) == two.salt(9, None)


def test_other_plans_spans_and_salts_do_not():
    values = [{"renorm": "always"}, {"renorm": "never"}]
    for k, span in itertools.product((1, 3), ("all", "prompt", "generated")):
        values.append({"dynamic_k": {"k": k, "span": span}})
    values.append({"dynamic_k": {"k": 1, "span": "last_prompt"}})
    salts = [
        compiled(value).salt(9, client)
        for value in values
        for client in (None, "mine", "yours")
    ]
    assert len(set(salts)) == len(salts)
    empty = compiled(values[0])
    assert empty.salt(9, "") == empty.salt(9, None)


@pytest.mark.parametrize(
    ("span", "depends"),
    [("all", False), ("prompt", True), ("generated", True), ("last_prompt", True)],
)
def test_prompt_length_counts_where_segments_differ(span, depends):
    request = compiled({"dynamic_k": {"k": 1, "span": span}})
    assert (request.salt(9, None) != request.salt(10, None)) is depends


def test_equal_salts_mean_equal_kv_at_every_position():
    """The plan behind each cacheable row is one function of the salt and position."""
    edits = ({"dynamic_k": {"k": 1}}, {"dynamic_k": {"k": 3}}, LAST_ONLY)
    behind = {}
    for edit, span, length in itertools.product(edits, SPANS, (1, 2, 3)):
        ((name, params),) = edit.items()
        request = compiled({name: {**params, "span": span}})
        marks = [
            plan.fingerprint if cached else None
            for plan, cached in zip(request.plans, request.cached, strict=True)
        ]
        body, last, generated = marks
        rows = [*[body] * (length - 1), last, *[generated] * (5 - length)]
        salt = request.salt(length, None)
        assert behind.setdefault(salt, rows) == rows
        assert (salt is None) == (rows == [None] * 5)


def test_segments_that_differ_in_the_last_layer_only_share_kv():
    # the prompt's length tells where the extra edit starts, but KV never sees it
    value = {"steer": {**LAST_ONLY["steer"], "span": "generated"}}
    assert compiled(value).salt(9, None) is None


def test_edits_that_kv_never_sees_do_not_part_requests():
    plain = {"dynamic_k": {"k": 1, "layers": [0, 2], "span": "prompt"}}
    steered = {**plain, "steer": {**LAST_ONLY["steer"], "span": "generated"}}
    assert compiled(plain).salt(9, None) == compiled(steered).salt(9, None)


def test_clients_cannot_forge_our_salts():
    check_client_salt(None)
    check_client_salt("mine")
    with pytest.raises(RequestError) as caught:
        check_client_salt(SALT_PREFIX + "0" * 40)
    assert caught.value.parameter == "cache_salt"


VALUES = [
    {},
    {"dynamic_k": {"p": 0.5}},
    {"dynamic_k": {"k": 1, "span": "generated"}, "renorm": "always"},
    {"steer": {"demote": [[1, 0]], "span": "prompt"}, "dynamic_k": {"k": 3}},
]


@pytest.mark.parametrize("value", VALUES)
def test_wire_carries_every_plan(value):
    msgspec = pytest.importorskip("msgspec")
    request = compiled(value)
    wire = request.to_wire()
    assert wire == msgspec.msgpack.decode(msgspec.msgpack.encode(wire))
    assert len(wire["segments"]) == len(SEGMENTS)
    for mark, plan in zip(wire["segments"], request.plans, strict=True):
        assert mark == (plan and plan.fingerprint)
        if plan is not None:
            back = RoutingPlan.from_bytes(wire["plans"][mark])
            assert back.fingerprint == mark
            back.validate(SHAPE)
