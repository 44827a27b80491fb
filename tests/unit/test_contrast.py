# SPDX-License-Identifier: Apache-2.0
"""From a contrast request to two routings and a combination."""

import numpy as np
import pytest

from moe_tta.compile import compile_request
from moe_tta.errors import RequestError
from moe_tta.kernels.contrast import COMBINE
from moe_tta.plan import Select
from moe_tta.settings import EngineSettings
from moe_tta.shape import RouterShape
from moe_tta.spec import parse
from moe_tta.strategies import PAIRS, PlanContext

SHAPE = RouterShape(
    layers=tuple(range(4)), num_hidden_layers=4, num_experts=8, top_k=2, k_max=4
)


def compiled(value, presets=None):
    return compile_request(parse(value, presets=presets or {}), PlanContext(SHAPE))


def contrast(**members):
    return compiled({"contrast": members})


def marks(request):
    return [plan and plan.fingerprint for plan in request.plans]


def test_weak_rank_is_one_expert_of_that_rank():
    request = contrast(weak={"rank": 2})
    assert request.neutral
    assert (request.pair.combination, request.pair.numbers) == ("contrast", (0.5, 0.1))
    for plan in request.pair.weak.plans:
        assert (plan.select == Select.RANKS).all()
        assert (plan.k_max == 1).all()
        assert (plan.select_args[:, 0] == 1).all()
        assert plan.renorm is None


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ({"rank": 2}, {"dynamic_k": {"rank": 2}}),
        ({"k": 1}, {"dynamic_k": {"k": 1}}),
        ({"k": 2}, {}),
        (
            {"rank": 3, "renorm": "always", "steer": {"drop": [[0, 1]]}},
            {
                "dynamic_k": {"rank": 3},
                "renorm": "always",
                "steer": {"drop": [[0, 1]]},
            },
        ),
    ],
)
def test_shorthands_mean_what_they_stand_for(short, long):
    by_itself = marks(compiled(long))
    assert marks(contrast(weak=short).pair.weak) == by_itself
    assert marks(contrast(weak=long).pair.weak) == by_itself


def test_each_stream_has_its_own_plans_and_salt():
    request = contrast(weak={"k": 1}, strong={"dynamic_k": {"k": 3}})
    assert marks(request) == marks(compiled({"dynamic_k": {"k": 3}}))
    salts = [r.salt(9, "own") for r in (request, request.pair.weak)]
    assert len({*salts, None}) == 3
    assert salts[1] == compiled({"dynamic_k": {"k": 1}}).salt(9, "own")
    assert contrast(weak={"k": 1}).salt(9, "own") is None


def test_a_rank_uses_one_layer_range_only():
    request = contrast(weak={"dynamic_k": {"rank": 8, "layers": [1, 2]}})
    used = request.pair.weak.plans[0].select == Select.RANKS
    assert used.tolist() == [False, True, True, False]
    assert np.array_equal(request.pair.weak.plans[0].k_max, [0, 1, 1, 0])


REFUSED = [
    ({"weak": {"rank": 9}}, "weak.rank", "expected 1..8, got 9"),
    ({"weak": {"k": 5}}, "weak.k", "expected 1..4, got 5"),
    ({"weak": {"dynamic_k": {"k": 5}}}, "weak.dynamic_k.k", "expected 1..4"),
    ({"weak": {"steer": {"drop": [[4, 0]]}}}, "weak.steer.drop[0]", "0-3"),
    (
        {"weak": {"rank": 2, "steer": {"allow": {"1": [0]}}}},
        "weak.steer.allow",
        "layer 1: 1 experts stay allowed",
    ),
    (
        {"weak": {}, "strong": {"steer": {"mask": "m"}}},
        "strong.steer.mask",
        "unknown",
    ),
]


@pytest.mark.parametrize(("members", "path", "words"), REFUSED)
def test_refused_with_the_path_the_client_wrote(members, path, words):
    with pytest.raises(RequestError) as caught:
        contrast(**members)
    assert caught.value.parameter == f"moe_tta.contrast.{path}"
    assert words in caught.value.message


def test_presets_may_contrast():
    given = {"presets": {"keen": {"contrast": {"weak": {"rank": 2}, "beta": 1}}}}
    presets = EngineSettings.read(given).presets
    assert compiled("keen", presets).pair.numbers == (1.0, 0.1)


@pytest.mark.parametrize("name", PAIRS)
def test_every_combination_is_known_to_the_worker(name):
    pair = PAIRS[name]
    combination, numbers = pair.combination(pair.params(weak={}))
    assert combination in COMBINE
    assert all(isinstance(number, float) for number in numbers)
