# SPDX-License-Identifier: Apache-2.0
"""Recall against hand-worked rows, plain Python, and the identities it must keep."""

import math

import numpy as np
import pytest
import torch

from moe_tta.kernels.recall import (
    GRID,
    ROWS_AT_ONCE,
    LayerMemory,
    Recalled,
    recall,
    recall_rows,
)
from moe_tta.kernels.reference import RoutingRule, model_routing, route
from moe_tta.kernels.table import Features, PlanTable
from moe_tta.plan import MAX_RECALLED, RoutingPlan
from tests.kernels.cases import LOGITS, RTOL, U, experts, make_plan, make_shape, used

SHAPE = make_shape(renormalize=False)
KEYS = [[0.75, math.sqrt(7) / 4], [0.5, math.sqrt(3) / 2], [-1.0, 0.0]]
VALUES = [[0.0, 0.0, 0.75, 0.25], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]]
ROW = [[3.0, 0.0]]  # cosines 0.75, 0.5, -1


def memory(keys=KEYS, values=VALUES, dtype=torch.float64):
    keys = torch.tensor(keys, dtype=dtype)
    keys = keys / keys.norm(dim=1, keepdim=True)
    return LayerMemory(keys, torch.tensor(values, dtype=torch.float32))


def counts(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def one(recalled, plan=None, shape=SHAPE, logits=LOGITS, features=Features.RECALL):
    """Route one row of `LOGITS` that recalls something; returns (ids, weights)."""
    table = PlanTable(shape, 1, "cpu")
    table.write({1: plan or RoutingPlan()})
    slots = torch.ones(1, dtype=torch.int32)
    rule = RoutingRule.from_shape(shape)
    rest = (table.layer(0), rule, shape.k_max, 0, features, recalled)
    return used(
        *(part[0] for part in route(torch.tensor([logits]), slots, slots, *rest))
    )


def test_two_neighbours_by_hand():
    found = recall(torch.tensor(ROW), counts(2), memory())
    want = [0.2, 0.2, 0.45, 0.15]  # (0.75 v_0 + 0.5 v_1) / 1.25
    np.testing.assert_allclose(found.target[0], want, rtol=U)
    assert found.mix.item() == 0.625
    # 0.375 p + 0.625 target = 0.275, 0.2375, 0.35625, 0.13125
    ids, weights = one(found)
    assert ids == [2, 0]
    np.testing.assert_allclose(weights, [0.35625, 0.275], rtol=RTOL)
    ids, weights = one(found, shape=make_shape(renormalize=True))
    np.testing.assert_allclose(weights, [0.35625 / 0.63125, 0.275 / 0.63125], RTOL)


def test_neighbours_of_negative_similarity_weigh_nothing_but_lower_the_share():
    two = recall(torch.tensor(ROW), counts(2), memory())
    three = recall(torch.tensor(ROW), counts(3), memory())
    assert torch.equal(three.target, two.target)
    assert three.mix.item() == pytest.approx(0.25 / 3, rel=U)


@pytest.mark.parametrize("hidden", [[-1.0, -1.0], [0.0, 0.0], [0.0, -2.0]])
@pytest.mark.parametrize("renormalize", [True, False])
def test_without_similarity_the_row_is_base_to_the_bit(hidden, renormalize):
    near = memory(KEYS[:2], VALUES[:2])
    found = recall(torch.tensor([hidden]), counts(2), near)
    assert found.mix.item() == 0
    shape = make_shape(renormalize=renormalize)
    rule = RoutingRule.from_shape(shape)
    own = model_routing(torch.tensor([LOGITS]), rule, shape.k_max)
    for features in (Features.RECALL, Features.ALL):
        assert one(found, shape=shape, features=features) == used(
            own.topk_weights[0], own.topk_ids[0]
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_row_equal_to_a_key_gets_its_assignment(dtype):
    """Not scaled either: the model does not renormalise, so neither is it."""
    rng = torch.Generator().manual_seed(0)
    hidden = torch.randn(8, 32, generator=rng).to(dtype)
    values = np.zeros((8, 4), np.float32)
    values[np.arange(8), np.arange(8) % 4] = 0.375
    values[np.arange(8), (np.arange(8) + 2) % 4] = 0.25
    near = memory(hidden.double().tolist(), values.tolist())
    found = recall(hidden, counts(*[1] * 8), near)
    assert found.mix.tolist() == [1.0] * 8
    assert torch.equal(found.target, near.values)
    for row in range(8):
        ids, weights = one(Recalled(*(part[row : row + 1] for part in found)))
        assert ids == [row % 4, (row + 2) % 4]
        assert weights == [0.375, 0.25]


def test_of_equal_cosines_the_lowest_places_come_first():
    """Equal on the grid: a key a hundredth of a step nearer comes after."""
    near = 0.75 + 0.01 / GRID
    keys = [[0.5, math.sqrt(3) / 2], KEYS[0], [near, math.sqrt(1 - near**2)], KEYS[0]]
    values = [[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]]
    for count, want in ((1, [0, 1.0, 0, 0]), (2, [0, 0.5, 0.5, 0])):
        found = recall(torch.tensor(ROW), counts(count), memory(keys, values))
        assert found.target[0].tolist() == want
        assert found.mix.item() == 0.75
    last = recall(torch.tensor(ROW), counts(4), memory(keys, values))
    np.testing.assert_allclose(last.target[0], [0.5 / 2.75, *[0.75 / 2.75] * 3], U)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_rows_without_a_number_recall_nothing(odd):
    found = recall(torch.tensor([[odd, 1.0], [1.0, 0.0]]), counts(2, 1), memory())
    assert found.mix.tolist() == [0.0, 0.75]
    assert found.target[0].tolist() == [0.0] * 4


def brute_force(hidden, count, keys, values):
    """Return (target, mix) of one row, in Python's floats."""
    length = math.sqrt(math.fsum(h * h for h in hidden))
    cosines = [
        math.fsum(h * k for h, k in zip(hidden, key, strict=True))
        / (length * math.sqrt(math.fsum(k * k for k in key)))
        for key in keys
    ]
    cosines = [round(cosine * GRID) / GRID for cosine in cosines]
    nearest = sorted(range(len(keys)), key=lambda j: -cosines[j])[:count]  # stable
    share = [max(cosines[j], 0.0) for j in nearest]
    total = math.fsum(share) or 1.0
    target = [
        math.fsum(s * values[j][e] for s, j in zip(share, nearest, strict=True)) / total
        for e in range(len(values[0]))
    ]
    mix = math.fsum(cosines[j] for j in nearest) / count if count else 0.0
    return target, min(max(mix, 0.0), 1.0)


def random_world(seed, rows=40, tokens=200, width=48, num_experts=8):
    rng = np.random.default_rng(seed)
    keys = rng.standard_normal((tokens, width)) + 0.3
    values = rng.dirichlet(np.ones(num_experts), tokens)
    values[values < 0.1] = 0
    hidden = rng.standard_normal((rows, width)).astype(np.float32) + 0.3
    numbers = rng.integers(0, MAX_RECALLED + 1, rows)
    return hidden, numbers, keys, values


@pytest.mark.parametrize("seed", range(3))
def test_random_rows_equal_brute_force(seed):
    hidden, numbers, keys, values = random_world(seed)
    found = recall(torch.tensor(hidden), counts(*numbers), memory(keys, values))
    values = values.astype(np.float32).astype(float)
    for row, count in enumerate(numbers):
        target, mix = brute_force(hidden[row].tolist(), count, keys, values)
        # float64 but for the last rounding, to float32
        assert found.mix[row].item() == pytest.approx(mix, abs=U)
        np.testing.assert_allclose(found.target[row], target, atol=U)


def test_rows_do_not_depend_on_their_company():
    hidden, numbers, keys, values = random_world(7, rows=70, tokens=500)
    near, hidden = memory(keys, values), torch.tensor(hidden)
    crowd = recall(hidden, counts(*numbers), near)
    for size in (1, 3, 16, 33):
        for start in range(0, 70, size):
            part = slice(start, start + size)
            alone = recall(hidden[part], counts(*numbers[part]), near)
            assert torch.equal(alone.target, crowd.target[part])
            assert torch.equal(alone.mix, crowd.mix[part])


def test_many_rows_and_none():
    hidden, _, keys, values = random_world(8, rows=1, width=8)
    near, many = memory(keys, values), ROWS_AT_ONCE + 3
    hidden = torch.tensor(hidden).expand(many, -1)
    found = recall(hidden, counts(*[5] * many), near)
    assert (found.target == found.target[0]).all()
    assert (found.mix == found.mix[0]).all()
    assert found.target.shape == (many, 8)
    assert recall(hidden[:0], counts(), near).target.shape == (0, 8)


def test_every_row_asks_the_memory_of_its_slot():
    hidden = torch.tensor(ROW * 5)
    table = PlanTable(SHAPE, 4, "cpu")
    plans = [(1, 2), (2, 1), (3, 1)]
    table.write(
        {
            slot: make_plan(memory=place, neighbours=number)
            for slot, (place, number) in enumerate(plans, start=1)
        }
    )
    memories = (memory(), memory(KEYS[:1], VALUES[:1]), None)
    slots = torch.tensor([0, 1, 2, 3, 4])
    found = recall_rows(hidden, slots, table.layer(0), memories)
    first = recall(hidden[:1], counts(2), memories[0])
    assert torch.equal(found.target[1], first.target[0])
    assert torch.equal(found.mix[1], first.mix[0])
    assert found.target[2].tolist() == VALUES[0]
    assert found.mix[2].item() == 0.75
    # no plan, a memory that lacks the layer, a plan without a memory
    assert not found.mix[[0, 3, 4]].any()


def test_order_of_operations():
    """Bias acts on the router's logits, before the blend; forbidding holds after it."""
    near = recall(torch.tensor(ROW), counts(2), memory())
    plan = make_plan(bias=[0, 0, 0, 100.0])  # the router's own is expert 3 alone
    ids, weights = one(near, plan, features=Features.ALL)
    # 0.375 (0, 0, 0, 1) + 0.625 target = 0.125, 0.125, 0.28125, 0.46875
    assert ids == [3, 2]
    np.testing.assert_allclose(weights, [0.46875, 0.28125], rtol=RTOL)
    plan = make_plan(allow=~experts(4, 2))
    ids, weights = one(near, plan, features=Features.ALL)
    # 0.375 (0.5, 0.375, 0, 0.125) + 0.625 target = 0.3125, 0.265625, -, 0.140625
    assert ids == [0, 1]
    np.testing.assert_allclose(weights, [0.3125, 0.265625], rtol=RTOL)


def test_a_plan_with_a_target_of_its_own_is_left_alone():
    none = Recalled(torch.zeros(1, 4), torch.zeros(1))
    plan = make_plan(target=[0, 0, 0, 1], mix=0.5)
    assert one(none, plan, features=Features.ALL) == one(
        None, plan, features=Features.ALL
    )
