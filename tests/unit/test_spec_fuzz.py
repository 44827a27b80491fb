# SPDX-License-Identifier: Apache-2.0
"""Whatever a client sends is accepted or a `RequestError`, never anything else."""

import copy
import json

from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from moe_tta.compile import compile_request
from moe_tta.errors import RequestError
from moe_tta.shape import RouterShape
from moe_tta.spec import RequestSpec, check_inline, parse
from moe_tta.strategies import PlanContext

SHAPE = RouterShape(
    layers=(1, 2, 3), num_hidden_layers=4, num_experts=8, top_k=2, k_max=4
)
GROUPED = RouterShape(
    layers=(0, 1),
    num_hidden_layers=2,
    num_experts=8,
    top_k=2,
    k_max=2,
    scoring="sigmoid",
    num_expert_group=4,
    topk_group=2,
    has_correction_bias=True,
)
PRESETS = {"safe": RequestSpec(preset="safe")}

VALID = [
    {"steer": {"promote": [[1, 0]], "demote": [[2, 1]], "drop": [[3, 7]]}},
    {"steer": {"allow": {"1": [0, 1, 2], "3": [4, 5]}, "span": "prompt"}},
    {"steer": {"bias": [[1, 2, 0.5]], "scale": [[1, 2, 2.0]], "strength": 0.5}},
    {"steer": {"scale": [[2, 2, 0]], "layers": [1, 3], "span": "last_prompt"}},
    {"dynamic_k": {"k": 1, "span": "generated"}, "renorm": "always"},
    {"dynamic_k": {"p": 0.4, "k_min": 1, "k_max": 2}, "renorm": "never"},
    {"steer": {"promote": [[1, 0]]}, "dynamic_k": {"k": 2, "layers": [0, 2]}},
    {"reroute": {"every": 8, "mode": "overlap", "lr": 0.1, "sign": -1}},
    {"reroute": {"replay": [[9, 8], [12, 20]], "layers": [1, 3]}, "renorm": "never"},
]

texts = st.one_of(
    st.sampled_from(["steer", "dynamic_k", "allow", "1", "all", "safe", "\ud800", "{"]),
    st.text(st.characters(codec=None), max_size=6),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([10**20, -(10**400), 2**63, 1e308, -0.0, 5e-324, 3.0]),
    st.floats(),
    texts,
)
trees = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4)
    ),
    max_leaves=8,
)
odd = st.one_of(
    trees,
    st.binary(max_size=4),
    st.tuples(trees),
    st.sets(st.integers(), max_size=2),
    st.dictionaries(st.integers() | st.booleans() | st.floats(), trees, max_size=2),
)
fuzz = settings(
    max_examples=1500, suppress_health_check=[HealthCheck.too_slow], deadline=None
)


def places(tree, path=()):
    """List the path of every node below the root."""
    inner = tree.items() if isinstance(tree, dict) else ()
    inner = enumerate(tree) if isinstance(tree, list) else inner
    for key, value in inner:
        yield (*path, key)
        yield from places(value, (*path, key))


@st.composite
def mutated(draw):
    """A valid request with one to three nodes replaced, removed, doubled or added."""
    tree = copy.deepcopy(draw(st.sampled_from(VALID)))
    for _ in range(draw(st.integers(1, 3))):
        found = list(places(tree))
        if not found:
            break
        *way, key = draw(st.sampled_from(found))
        parent = tree
        for step in way:
            parent = parent[step]
        kind = draw(st.sampled_from(["replace", "remove", "double", "add"]))
        if kind == "replace":
            parent[key] = draw(trees)
        elif kind == "remove":
            del parent[key]
        elif kind == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif isinstance(parent, dict):
            parent[draw(texts)] = draw(trees)
    return tree


def check(value):
    """Parse and compile; return whether the request was accepted."""
    error = None
    try:
        spec = parse(value, presets=PRESETS)
        for shape in (SHAPE, GROUPED):
            compiled = compile_request(spec, PlanContext(shape))
            for plan in compiled.plans:
                if plan is not None:
                    plan.validate(shape)
            compiled.salt(3, None)
            compiled.to_wire()
        check_inline(spec, allow_inline=False)
    except RequestError as err:
        error = err
    if error is not None:
        assert error.parameter.startswith("moe_tta")
        assert f"{error}{error.value}".isascii()
        assert len(error.message) < 1000
    return error is None


@fuzz
@given(odd)
@example({"steer": {"allow": {float("nan"): [1]}}})
@example('{"a":' * 3000)
@example("\ud800")
@example(object())
@example({"[key]": 1})  # pydantic's own mark in an error's location
@example({"steer": {"allow": {"[key]": 1}}})
def test_any_python_value(value):
    check(value)


@fuzz
@given(trees)
def test_any_json_string(tree):
    text = json.dumps(tree)
    check(text)
    check("{" + text)
    check(text[: len(text) // 2])


@fuzz
@given(mutated())
def test_mutated_requests(tree):
    assert check(tree) == check(json.dumps(tree))


def test_the_mutated_requests_were_valid():
    for value in VALID:
        compile_request(parse(value, presets={}), PlanContext(SHAPE))
