# SPDX-License-Identifier: Apache-2.0
"""remix without an engine: its plans, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest

from moe_tta import RouterShape
from moe_tta.deferred import DeferredRequest, compile_or_defer
from moe_tta.errors import RequestError
from moe_tta.remix.errors import StoreError
from moe_tta.remix.updates import confidence
from moe_tta.settings import AdapterSettings
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext, Prompt
from tests.remix.making import DIM, SHAPE, made_store, random_pathways, served

COUNT = 10
LAST_FIVE = [2, 3, 4, 5, 6]  # places of layers 3, 5, 6, 7, 8
TEXTS = {"near 4": 4, "the prompt": 6}


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    pathways = random_pathways(rng, COUNT).astype(np.float32)
    return pathways, rng.standard_normal((COUNT, DIM)).astype(np.float32)


@pytest.fixture(scope="module")
def context(tmp_path_factory, arrays):
    pathways, states = arrays
    table = {text: states[row] for text, row in TEXTS.items()}
    folder = tmp_path_factory.mktemp("stores")
    whole = made_store(folder / "whole", states, pathways)
    few = made_store(folder / "few", states, pathways, layers=(1, 2))
    stores = {
        "solved": served(whole, table),
        "hidden": served(whole),
        "few": served(few, table),
        "broken": StoreError("index.faiss: sha256 is off"),
    }
    return PlanContext(SHAPE, stores=stores)


def compiled(context, text="the prompt", tokens=(5, 6, 7), **member):
    asked = compile_or_defer(parse({"remix": member}, presets={}), context)
    assert isinstance(asked, DeferredRequest)
    return asked.compile(context, Prompt(tokens, lambda ids: text))


def plan_of(context, **member):
    """Return the plan of the last prompt token, the only one."""
    body, last, generated = compiled(context, **member).plans
    assert body is None
    assert generated is None
    return last


def test_the_nearest_neighbours_pathway_is_the_target(context, arrays):
    plan = plan_of(context, store="solved", k=1)
    assert plan.mix.tolist() == [0, 0, 1, 1, 1, 1, 1]
    np.testing.assert_array_equal(plan.target[LAST_FIVE], arrays[0][6][LAST_FIVE])
    assert not plan.target[:2].any()
    assert list(plan.arrays()) == ["target", "mix"]


def test_query_and_vector_come_before_the_prompt(context, arrays):
    pathways, states = arrays
    for given in ({"query": "near 4"}, {"vector": (3 * states[4]).tolist()}):
        plan = plan_of(context, store="solved", k=1, **given)
        np.testing.assert_array_equal(plan.target[LAST_FIVE], pathways[4][LAST_FIVE])


def test_shares_of_the_own_distribution(context):
    plan = plan_of(context, store="solved", alpha=0.25)
    assert plan.mix.tolist() == [0, 0] + [0.75] * 5
    assert plan_of(context, store="solved", alpha=1.0) is None
    plan = plan_of(context, store="solved", k=4, confidence=True, floor=-1)
    np.testing.assert_allclose(plan.target[LAST_FIVE].sum(axis=1), 1, rtol=1e-6)
    assert 0 < plan.mix[6] < 1


def test_confidence_is_the_mean_similarity(context, arrays):
    _, states = arrays
    unit = states / np.linalg.norm(states, axis=1, keepdims=True)
    near = np.sort(unit @ unit[6])[::-1][:3]
    near = near[near >= 0]
    plan = plan_of(context, store="solved", confidence=True)
    np.testing.assert_allclose(plan.mix[6], confidence(near), rtol=1e-6)


def test_spans(context):
    paper = compiled(context, store="solved").plans
    release = compiled(context, store="solved", span="last_prompt+generated").plans
    assert [plan is None for plan in paper] == [True, False, True]
    assert [plan is None for plan in release] == [True, False, False]
    assert release[1].fingerprint == release[2].fingerprint == paper[1].fingerprint


def test_layers(context, arrays):
    plan = plan_of(context, store="solved", k=1, layers=[2, 4])
    assert plan.mix.tolist() == [0, 1, 1, 0, 0, 0, 0]
    plan = plan_of(context, store="few", k=1)
    assert plan.mix.tolist() == [1, 1, 0, 0, 0, 0, 0]
    np.testing.assert_array_equal(plan.target[:2], arrays[0][6][:2])


def test_no_neighbour_changes_nothing(context):
    for how in ({"floor": 1.0, "ceiling": 0.9}, {"radius": 0.0, "ceiling": 0.9}):
        asked = compiled(context, store="solved", **how)
        assert asked.neutral
        assert asked.salt(3, None) is None


def test_given_distributions(context):
    given = [0.5, 0.25, 0.25, 0, 0, 0]
    plan = plan_of(context, distribution={"3": given, "8": given[::-1]}, alpha=0.5)
    assert plan.mix.tolist() == [0, 0, 0.5, 0, 0, 0, 0.5]
    assert plan.target[2].tolist() == given
    assert plan.target[6].tolist() == given[::-1]
    assert not plan.target[[0, 1, 3, 4, 5]].any()


def test_the_prompt_ends_where_the_request_says(context):
    seen = []

    def decode(ids):
        seen.append(list(ids))
        return "near 4"

    value = {"remix": {"store": "solved"}, "prompt_tokens": 2}
    asked = compile_or_defer(parse(value, presets={}), context)
    done = asked.compile(context, Prompt([5, 6, 7], decode))
    assert seen == [[5, 6]]
    assert done.prompt_tokens == 2
    assert done.to_wire()["prompt_tokens"] == 2
    other = compile_or_defer(parse({"remix": {"store": "solved"}}, presets={}), context)
    plain = other.compile(context, Prompt([5, 6], decode))
    # the plan ends at position 1 in both: equal tokens have equal KV
    assert done.salt(3, None) == plain.salt(2, None) != plain.salt(3, None)


REFUSED = {
    "unknown store": ({"store": "solvd"}, "store", "did you mean 'solved'?"),
    "broken store": ({"store": "broken"}, "store", "cannot be used: index.faiss: sha"),
    "k": ({"store": "solved", "k": 11}, "k", "expected 1..10, got 11"),
    "vector": ({"store": "solved", "vector": [1, 2]}, "vector", "8 numbers, got 2"),
    "zero": ({"store": "solved", "vector": [0] * 8}, "vector", "that is not zero"),
    "no vector": ({"store": "hidden"}, "vector", "is missing: this store's"),
    "layers": ({"store": "few", "layers": [2, 5]}, "layers", "holds (1-2), got [2, 5]"),
    "range": ({"store": "solved", "layers": [2, 9]}, "layers", "first <= last <= 8"),
    "mode": ({"store": "solved", "update": "mode"}, "update", "known only once"),
    "layer": ({"distribution": {"4": [1]}}, "distribution.4", "an MoE layer of this"),
    "experts": ({"distribution": {"3": [1]}}, "distribution.3", "6 numbers, got 1"),
    "sum": ({"distribution": {"3": [0.1] * 6}}, "distribution.3", "sum to 1"),
    "sign": (
        {"distribution": {"3": [2, -1, 0, 0, 0, 0]}},
        "distribution.3",
        "numbers >= 0",
    ),
}


@pytest.mark.parametrize(("member", "path", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_before_the_prompt_is_read(context, member, path, words):
    with pytest.raises(RequestError) as caught:
        compile_or_defer(parse({"remix": member}, presets={}), context)
    assert caught.value.parameter == f"moe_tta.remix.{path}"
    assert words in caught.value.message


MALFORMED = {
    "neither": ({}, "", "either store or distribution"),
    "both": ({"store": "a", "distribution": {"3": [1]}}, "", "either store or"),
    "k and distribution": ({"distribution": {"3": [1]}, "k": 1}, "", "not both"),
    "query and vector": ({"store": "a", "query": "b", "vector": [1]}, "", "not both"),
    "two shares": ({"store": "a", "alpha": 0, "confidence": True}, "", "not both"),
    "k 0": ({"store": "a", "k": 0}, ".k", "greater than or equal to 1"),
    "k 65": ({"store": "a", "k": 65}, ".k", "less than or equal to 64"),
    "alpha": ({"store": "a", "alpha": 1.5}, ".alpha", "less than or equal to 1"),
    "kernel": ({"store": "a", "kernel": "box"}, ".kernel", "gaussian"),
    "bandwidth": ({"store": "a", "bandwidth": 0}, ".bandwidth", "greater than 0"),
    "span": ({"store": "a", "span": "all"}, ".span", "last_prompt+generated"),
    "floor": ({"store": "a", "floor": -2}, ".floor", "greater than or equal to -1"),
    "vector": ({"store": "a", "vector": ["x"]}, ".vector[0]", "expected a number"),
    "key": ({"distribution": {"x": [1]}}, ".distribution.x", "a layer number"),
}


@pytest.mark.parametrize(("member", "path", "words"), MALFORMED.values(), ids=MALFORMED)
def test_malformed(member, path, words):
    with pytest.raises(RequestError) as caught:
        parse({"remix": member}, presets={})
    assert caught.value.parameter == f"moe_tta.remix{path}"
    assert words in caught.value.message


def test_refused_with_the_prompt(context):
    asked = compile_or_defer(parse({"remix": {"store": "solved"}}, presets={}), context)
    for prompt, words in (
        (Prompt(None, lambda ids: ""), "embeddings have no text: give query or vector"),
        (Prompt([1], lambda ids: " "), "the prompt has no text"),
    ):
        with pytest.raises(RequestError, match=words) as caught:
            asked.compile(context, prompt)
        assert caught.value.parameter == "moe_tta.remix.query"


def test_routers_without_a_distribution(context):
    shape = RouterShape((0,), 1, 6, 2, 2, scoring="sigmoid")
    value = parse({"remix": {"store": "solved"}}, presets={})
    with pytest.raises(RequestError, match=r"remix\.store: needs a softmax router"):
        compile_or_defer(value, PlanContext(shape, stores=context.stores))


def test_other_members_are_checked_before_the_prompt(context):
    value = {"remix": {"store": "solved"}, "dynamic_k": {"k": 9}}
    with pytest.raises(RequestError, match=r"moe_tta\.dynamic_k\.k"):
        compile_or_defer(parse(value, presets={}), context)


def test_remix_in_a_stream_of_a_pair(context, arrays):
    value = {
        "contrast": {"weak": {"rank": 2}, "strong": {"remix": {"store": "solved"}}}
    }
    asked = compile_or_defer(parse(value, presets={}), context)
    done = asked.compile(context, Prompt([1], lambda ids: "near 4"))
    assert done.plans[1].mix[6] == 1
    assert done.pair.weak.plans[1].target is None
    value["contrast"]["strong"] = {"remix": {"store": "none"}}
    with pytest.raises(RequestError, match=r"^moe_tta\.contrast\.strong\.remix\.store"):
        compile_or_defer(parse(value, presets={}), context)


def test_prompt_tokens_do_not_go_with_pairs():
    value = {"contrast": {"weak": {"rank": 2}}, "prompt_tokens": 3}
    with pytest.raises(RequestError, match=r"prompt_tokens: expected not beside"):
        parse(value, presets={})


def test_given_distributions_are_inline_edits():
    spec = parse({"remix": {"distribution": {"3": [1]}}}, presets={})
    assert spec.members["remix"].inline_edits() == ("distribution",)
    spec = parse({"remix": {"store": "a", "vector": [1]}}, presets={})
    assert spec.members["remix"].inline_edits() == ()


@pytest.mark.parametrize("update", ["ngd", "search_alpha"])
def test_searches_need_gradients(context, update):
    without = replace(context, adapter=AdapterSettings(gradients=False))
    words = f"expected 'kernel_regression', got '{update}'.*takes no gradients"
    with pytest.raises(RequestError, match=words) as error:
        compiled(without, store="solved", update=update)
    assert error.value.parameter == "moe_tta.remix.update"
