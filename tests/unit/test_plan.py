# SPDX-License-Identifier: Apache-2.0
import dataclasses

import numpy as np
import pytest

from moe_tta.plan import FIELDS, PlanError, RoutingPlan, Select, merge
from moe_tta.shape import RouterShape

L, E = 3, 8
SHAPE = RouterShape(
    layers=(1, 2, 5), num_hidden_layers=6, num_experts=E, top_k=2, k_max=4
)
GROUPED = dataclasses.replace(SHAPE, num_expert_group=4, topk_group=2)


def per_layer(name, value):
    dtype, per_expert, _ = FIELDS[name]
    size = (L, E) if per_expert else (L,)
    return np.full((L, 3) if name == "select_args" else size, value, dtype)


def experts(*chosen, layer=None):
    """Return bool [L, E]: the chosen experts, in one layer or in all."""
    mask = np.zeros((L, E), bool)
    mask[slice(None) if layer is None else layer, list(chosen)] = True
    return mask


def counting(select, k_max=2, k_min=1, args=(0, 0, 0)):
    return RoutingPlan(
        select=per_layer("select", select),
        k_min=per_layer("k_min", k_min),
        k_max=per_layer("k_max", k_max),
        select_args=np.tile(np.float32(args), (L, 1)),
    )


def full_plan():
    """Return a plan with every field set, valid for SHAPE."""
    rng = np.random.default_rng(0)
    target = rng.random((L, E)).astype(np.float32)
    return RoutingPlan(
        allow=~experts(0),
        bias=rng.standard_normal((L, E)).astype(np.float32),
        promote=experts(1),
        demote=experts(2, layer=1),
        target=target / target.sum(axis=1, keepdims=True),
        mix=np.float32([0.5, 0, 1]),
        memory=np.int32([0, 2, 0]),
        neighbours=np.int32([0, 5, 0]),
        select=np.int32([Select.SAMPLE, Select.MODEL, Select.TOP_P]),
        k_min=np.int32([1, 1, 2]),
        k_max=np.int32([3, 0, 4]),
        select_args=np.float32([[2, 8, 1], [0, 0, 0], [0.5, 0, 0]]),
        seed=np.int64([1, 2, -(2**60)]),
        scale=rng.random((L, E)).astype(np.float32),
        drop=experts(3),
        renorm=np.int32([0, 1, 2]),
    )


def test_full_and_neutral_plans_are_valid():
    full_plan().validate(SHAPE)
    RoutingPlan().validate(SHAPE)
    RoutingPlan().validate(GROUPED)


def test_normalised_drops_what_says_nothing():
    spelled_out = RoutingPlan(
        **{name: per_layer(name, FIELDS[name][2]) for name in FIELDS}
    )
    assert not spelled_out.neutral
    assert spelled_out.normalised().neutral
    no_mix = dataclasses.replace(full_plan(), mix=np.zeros(L, np.float32))
    assert no_mix.normalised().target is None
    model = dataclasses.replace(full_plan(), select=np.zeros(L, np.int32))
    kept = set(model.normalised().arrays())
    assert kept == set(FIELDS) - {"select", "k_min", "k_max", "select_args", "seed"}


def test_normalised_keeps_all_numbers_of_a_rule():
    plan = counting(Select.TOP_P).normalised()  # p = 0 means the first expert only
    assert set(plan.arrays()) == {"select", "k_max", "select_args"}
    plan.validate(SHAPE)


def test_normalised_mends_types_and_layout():
    loose = RoutingPlan(
        bias=np.asfortranarray(np.arange(L * E).reshape(L, E)),
        select=np.array([Select.TOP_K] * L),
        k_max=np.array([2] * L),
        select_args=np.zeros((L, 3)),
    )
    loose.normalised().validate(SHAPE)
    with pytest.raises(PlanError, match="select needs k_max"):
        RoutingPlan(select=np.array([Select.TOP_K] * L)).normalised().validate(SHAPE)


def test_equal_meaning_has_equal_fingerprints():
    plan = full_plan().normalised()
    assert plan.fingerprint == full_plan().normalised().fingerprint
    strided = RoutingPlan(
        **{name: np.asfortranarray(value) for name, value in plan.arrays().items()}
    )
    assert strided.fingerprint == plan.fingerprint
    bias = per_layer("bias", 1)
    spelled_out = RoutingPlan(bias=bias, scale=per_layer("scale", 1))
    assert (
        spelled_out.normalised().fingerprint
        == RoutingPlan(bias=bias.astype(np.float64)).normalised().fingerprint
    )


@pytest.mark.parametrize("name", FIELDS)
def test_any_change_changes_the_fingerprint(name):
    plan = full_plan()
    seen = {plan.fingerprint, RoutingPlan().fingerprint}
    value = getattr(plan, name)
    last = value.copy()
    last.flat[-1] = not last.flat[-1] if last.dtype == bool else last.flat[-1] + 1
    for other in (last, np.roll(value, 1, axis=0), None):
        if other is not None and np.array_equal(other, value):
            other = ~other if other.dtype == bool else other + 1
        seen.add(dataclasses.replace(plan, **{name: other}).fingerprint)
    assert len(seen) == 5


def test_order_of_layers_is_part_of_the_fingerprint():
    one, other = (RoutingPlan(promote=experts(1, layer=layer)) for layer in (0, 1))
    assert one.fingerprint != other.fingerprint


def test_fields_of_equal_bytes_do_not_collide():
    mask = experts(1)
    prints = {
        RoutingPlan(**{name: mask}).fingerprint
        for name in ("allow", "promote", "demote", "drop")
    }
    assert len(prints) == 4


def test_bytes_round_trip():
    plan = full_plan()
    plan = dataclasses.replace(plan, bias=np.asfortranarray(plan.bias))
    back = RoutingPlan.from_bytes(plan.to_bytes())
    assert back.arrays().keys() == plan.arrays().keys()
    for name, value in plan.arrays().items():
        np.testing.assert_array_equal(getattr(back, name), value, strict=True)
    assert back.fingerprint == plan.fingerprint
    assert RoutingPlan.from_bytes(RoutingPlan().to_bytes()).neutral


def test_edited_layers():
    plan = RoutingPlan(promote=experts(1, layer=0), scale=per_layer("scale", 1))
    assert plan.edited_layers().tolist() == [True, False, False]
    plan = dataclasses.replace(counting(Select.MODEL), target=full_plan().target)
    assert plan.edited_layers().tolist() == [False] * 3
    assert full_plan().edited_layers().all()


def test_merge_joins_different_fields():
    promote, drop = RoutingPlan(promote=experts(1)), RoutingPlan(drop=experts(2))
    merged = merge([promote, RoutingPlan(), drop])
    assert merged.arrays().keys() == {"promote", "drop"}
    assert merged.promote is promote.promote
    assert merge([]).neutral


def test_merge_refuses_a_clash():
    clash = [full_plan(), RoutingPlan(scale=per_layer("scale", 2), drop=experts(1))]
    with pytest.raises(PlanError, match="two strategies both set drop, scale"):
        merge(clash)


def test_shape_difference_names_fields():
    assert SHAPE.difference(SHAPE) == ""
    assert GROUPED.difference(SHAPE) == "num_expert_group 4 != 1, topk_group 2 != 1"
    assert GROUPED.grouped
    assert not SHAPE.grouped
    assert SHAPE.is_distribution
    assert not dataclasses.replace(SHAPE, has_correction_bias=True).is_distribution
