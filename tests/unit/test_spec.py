# SPDX-License-Identifier: Apache-2.0
"""Parsing: what is accepted, and the exact parameter of what is refused."""

import json

import numpy as np
import pytest

from moe_tta.errors import SHOWN, RequestError, show
from moe_tta.settings import EngineSettings
from moe_tta.spec import MAX_JSON_CHARS, RequestSpec, check_inline, parse
from moe_tta.strategies import PAIRS, STRATEGIES, register, register_pair

ACCEPTED = {
    "nothing": {},
    "empty strategy": {"steer": {}},
    "null is not given": {"steer": None, "dynamic_k": {"k": 2, "p": None}},
    "promote": {"steer": {"promote": [[0, 1], [0, 2]], "demote": [[1, 0]]}},
    "allow": {"steer": {"allow": {"0": [1, 2], "12": []}}},
    "graded": {"steer": {"bias": [[0, 1, -2.5]], "scale": [[0, 1, 3]], "strength": 2}},
    "integer for a number": {"steer": {"bias": [[0, 1, 1]]}, "dynamic_k": {"p": 1}},
    "scope": {"steer": {"drop": [[3, 4]], "span": "last_prompt", "layers": [3, 3]}},
    "mask": {"steer": {"mask": "any name", "strength": 0}},
    "rank": {"dynamic_k": {"rank": 2}},
    "contrast": {"contrast": {"weak": {"rank": 2}}},
    "contrast of plans": {
        "contrast": {
            "weak": {"k": 1, "renorm": "always", "steer": {"drop": [[0, 1]]}},
            "strong": {"dynamic_k": {"p": 0.5}},
            "beta": 10,
            "alpha": 0,
        }
    },
    "contrast with itself": {"contrast": {"weak": {}}},
    "both": {"dynamic_k": {"p": 0.5, "k_min": 2, "k_max": 4}, "renorm": "never"},
}

# case -> (value, parameter, part of the message)
REFUSED = {
    "not an object": ([], "moe_tta", "expected an object or the name"),
    "nothing": (None, "moe_tta", "got null"),
    "bytes": (b"{}", "moe_tta", "expected an object"),
    "boolean": (True, "moe_tta", "got true"),
    "unknown preset": ("saef", "moe_tta", "did you mean 'safe'? known: plain, safe"),
    "empty name": ("", "moe_tta", "unknown preset"),
    "broken JSON": ("{", "moe_tta", "expected a JSON object"),
    "tail after JSON": ("{}{}", "moe_tta", "Extra data"),
    "repeated key": ('{"steer":{"span":"all","span":"all"}}', "moe_tta", "given twice"),
    "deep JSON": ('{"a":' * 90_000, "moe_tta", "nested too deeply"),
    "long JSON": ('{"a":"' + "x" * MAX_JSON_CHARS + '"}', "moe_tta", "at most"),
    "long integer": ('{"dynamic_k":{"k":' + "9" * 5000 + "}}", "moe_tta", "4300"),
    "no JSON form": ({"steer": {1, 2}}, "moe_tta", "a set has no JSON form"),
    "unknown member": ({"ster": {}}, "moe_tta.ster", "did you mean 'steer'?"),
    "unknown inside": (
        {"steer": {"promot": []}},
        "moe_tta.steer.promot",
        "did you mean 'promote'?",
    ),
    "two rules by rank": (
        {"dynamic_k": {"rank": 2, "k_min": 1}},
        "moe_tta.dynamic_k",
        "k_max only with p",
    ),
    "contrast with what": ({"contrast": {}}, "moe_tta.contrast.weak", "is missing"),
    "contrast no object": ({"contrast": 1}, "moe_tta.contrast", "an object, got 1"),
    "weak no object": (
        {"contrast": {"weak": 2}},
        "moe_tta.contrast.weak",
        "an object, got 2",
    ),
    "weak shorthand": (
        {"contrast": {"weak": {"rank": 0}}},
        "moe_tta.contrast.weak.rank",
        "got 0",
    ),
    "weak unknown": (
        {"contrast": {"weak": {"rnk": 2}}},
        "moe_tta.contrast.weak.rnk",
        "did you mean 'rank'? known: dynamic_k, k, knn, rank, remix, renorm, steer",
    ),
    "weak inside": (
        {"contrast": {"weak": {"steer": {"promot": []}}}},
        "moe_tta.contrast.weak.steer.promot",
        "did you mean 'promote'?",
    ),
    "strong inside": (
        {"contrast": {"weak": {}, "strong": {"rank": 2}}},
        "moe_tta.contrast.strong.rank",
        "known: dynamic_k, knn, remix, renorm, steer",
    ),
    "weak rule twice": (
        {"contrast": {"weak": {"rank": 2, "dynamic_k": {"k": 1}}}},
        "moe_tta.contrast.weak",
        "expected one of rank, k and dynamic_k",
    ),
    "contrast of contrast": (
        {"contrast": {"weak": {"contrast": {"weak": {}}}}},
        "moe_tta.contrast.weak.contrast",
        "unknown member",
    ),
    "beside contrast": (
        {"contrast": {"weak": {}}, "renorm": "never"},
        "moe_tta.renorm",
        "expected inside moe_tta.contrast.strong or moe_tta.contrast.weak",
    ),
    "strategy beside contrast": (
        {"contrast": {"weak": {}}, "steer": {}},
        "moe_tta.steer",
        "not beside contrast",
    ),
    "beta": (
        {"contrast": {"weak": {}, "beta": 10.5}},
        "moe_tta.contrast.beta",
        "less than or equal to 10",
    ),
    "alpha": (
        {"contrast": {"weak": {}, "alpha": float("nan")}},
        "moe_tta.contrast.alpha",
        "a finite number",
    ),
    "odd key": ({"a é": 1}, r'moe_tta["a \u00e9"]', "unknown member"),
    "broken key": ({"a\ud800": 1}, "moe_tta", r'expected a string, got "a\ud800"'),
    "odd string": ({"steer": {"span": "\ud800"}}, "moe_tta.steer.span", r'"\ud800"'),
    "strategy no object": ({"steer": 3}, "moe_tta.steer", "an object, got 3"),
    "renorm": ({"renorm": True}, "moe_tta.renorm", "'model', 'always' or 'never'"),
    "span": ({"steer": {"span": "decode"}}, "moe_tta.steer.span", "'generated'"),
    "list": ({"steer": {"promote": {"0": 1}}}, "moe_tta.steer.promote", "a list"),
    "string no list": ({"steer": {"drop": "ab"}}, "moe_tta.steer.drop", "a list"),
    "entry too short": (
        {"steer": {"promote": [[0, 1], [2, 3], [4]]}},
        "moe_tta.steer.promote[2]",
        "expected [layer, expert], got [4]",
    ),
    "entry too long": (
        {"steer": {"bias": [[0, 1, 2, 3]]}},
        "moe_tta.steer.bias[0]",
        "expected [layer, expert, value]",
    ),
    "boolean layer": (
        {"steer": {"demote": [[True, 1]]}},
        "moe_tta.steer.demote[0][0]",
        "expected an integer, got true",
    ),
    "float expert": (
        {"steer": {"demote": [[0, 2.0]]}},
        "moe_tta.steer.demote[0][1]",
        "expected an integer, got 2.0",
    ),
    "string expert": (
        {"steer": {"demote": [[0, "1"]]}},
        "moe_tta.steer.demote[0][1]",
        'got "1"',
    ),
    "NaN": (
        '{"steer": {"bias": [[0, 1, NaN]]}}',
        "moe_tta.steer.bias[0][2]",
        "expected a finite number, got NaN",
    ),
    "overflow": (
        '{"steer": {"bias": [[0, 1, 1e999]]}}',
        "moe_tta.steer.bias[0][2]",
        "expected a finite number, got Infinity",
    ),
    "large bias": (
        {"steer": {"bias": [[0, 1, 10001]]}},
        "moe_tta.steer.bias[0][2]",
        "10000",
    ),
    "boolean bias": (
        {"steer": {"bias": [[0, 1, True]]}},
        "moe_tta.steer.bias[0][2]",
        "expected a number, got true",
    ),
    "negative scale": (
        {"steer": {"scale": [[0, 1, -0.5]]}},
        "moe_tta.steer.scale[0][2]",
        "greater than or equal to 0",
    ),
    "repeated expert": (
        {"steer": {"bias": [[0, 1, 2], [0, 1, 3]]}},
        "moe_tta.steer.bias",
        "layer 0 expert 1 is listed twice",
    ),
    "repeated allowed": (
        {"steer": {"allow": {"3": [1, 1]}}},
        "moe_tta.steer.allow.3",
        "expert 1 is listed twice",
    ),
    "layer key": (
        {"steer": {"allow": {"03": [1]}}},
        "moe_tta.steer.allow.03",
        "layer number",
    ),
    "boolean layer key": (
        {"steer": {"allow": {True: [1]}}},
        "moe_tta.steer.allow.true",
        "layer number",
    ),
    "allowed float": (
        {"steer": {"allow": {"3": [1, 2.5]}}},
        "moe_tta.steer.allow.3[1]",
        "an integer",
    ),
    "strength": (
        {"steer": {"strength": 101}},
        "moe_tta.steer.strength",
        "less than or equal to 100",
    ),
    "layers": ({"steer": {"layers": [1]}}, "moe_tta.steer.layers", "[first, last]"),
    "no rule": ({"dynamic_k": {}}, "moe_tta.dynamic_k", "exactly one of k, rank and p"),
    "two rules": (
        {"dynamic_k": {"k": 2, "p": 0.5}},
        "moe_tta.dynamic_k",
        "exactly one of k, rank and p",
    ),
    "bounds of k": (
        {"dynamic_k": {"k": 2, "k_max": 3}},
        "moe_tta.dynamic_k",
        "only with p",
    ),
    "k zero": ({"dynamic_k": {"k": 0}}, "moe_tta.dynamic_k.k", "got 0"),
    "k float": ({"dynamic_k": {"k": 2.0}}, "moe_tta.dynamic_k.k", "got 2.0"),
    "p outside": ({"dynamic_k": {"p": 1.01}}, "moe_tta.dynamic_k.p", "equal to 1"),
    "p boolean": ({"dynamic_k": {"p": False}}, "moe_tta.dynamic_k.p", "got false"),
    "p NaN": ({"dynamic_k": {"p": float("nan")}}, "moe_tta.dynamic_k.p", "finite"),
}

PRESETS = {"safe": RequestSpec(preset="safe"), "plain": RequestSpec(preset="plain")}


@pytest.mark.parametrize("value", ACCEPTED.values(), ids=ACCEPTED)
def test_object_and_json_string_parse_alike(value):
    spec = parse(value, presets={})
    assert parse(" \n" + json.dumps(value), presets={}) == spec
    assert spec.preset is None


@pytest.mark.parametrize(("value", "parameter", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_exact_parameter(value, parameter, words):
    with pytest.raises(RequestError) as caught:
        parse(value, presets=PRESETS)
    assert caught.value.parameter == parameter
    assert words in caught.value.message
    assert str(caught.value).isascii()
    assert len(caught.value.message) < 4 * SHOWN


def test_offline_forms_equal_json():
    plain = parse({"steer": {"allow": {"3": [1, 2]}, "promote": [[0, 1]]}}, presets={})
    steer = {"allow": {3: np.array([1, 2])}, "promote": [(np.int64(0), 1)]}
    assert parse({"steer": steer}, presets={}) == plain


def test_preset_by_name():
    assert parse("safe", presets=PRESETS) is PRESETS["safe"]


def test_shown_values_are_short_ascii():
    for value in ("é" * 99, list(range(99)), {"a": float("inf")}, object(), 10**5000):
        assert show(value).isascii()
        assert len(show(value)) <= SHOWN


@pytest.mark.parametrize("member", ["promote", "demote", "drop", "allow", "bias"])
def test_inline_edits_need_the_operator(member):
    value = {"allow": {0: [1]}, "bias": [[0, 1, 1.0]]}.get(member, [[0, 1]])
    spec = parse({"steer": {member: value}}, presets={})
    check_inline(spec, allow_inline=True)
    with pytest.raises(RequestError, match="allow_inline") as caught:
        check_inline(spec, allow_inline=False)
    assert caught.value.parameter == f"moe_tta.steer.{member}"


def test_inline_edits_of_either_stream_need_the_operator():
    edit = {"steer": {"demote": [[0, 1]]}}
    for contrast, stream in (
        ({"weak": edit}, "weak"),
        ({"weak": {}, "strong": edit}, "strong"),
    ):
        spec = parse({"contrast": contrast}, presets={})
        check_inline(spec, allow_inline=True)
        with pytest.raises(RequestError, match="allow_inline") as caught:
            check_inline(spec, allow_inline=False)
        assert caught.value.parameter == f"moe_tta.contrast.{stream}.steer.demote"
    check_inline(parse({"contrast": {"weak": {"rank": 2}}}, presets={}), False)


def test_operators_own_edits_and_counts_are_always_fine():
    value = {"steer": {"mask": "m"}, "dynamic_k": {"k": 1}, "renorm": "always"}
    check_inline(parse(value, presets={}), allow_inline=False)
    settings = EngineSettings.read(
        {"presets": {"calm": {"steer": {"demote": [[0, 1]]}}}, "default": "calm"}
    )
    spec = parse("calm", presets=settings.presets)
    assert spec.preset == "calm"
    check_inline(spec, allow_inline=False)


def test_registered_names_are_unique():
    with pytest.raises(ValueError, match="'steer' is already registered"):
        register(STRATEGIES["steer"])
    with pytest.raises(ValueError, match="'contrast' is already registered"):
        register_pair(PAIRS["contrast"])
