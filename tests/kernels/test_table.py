# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest
import torch

from moe_tta.kernels.table import Features, PlanTable
from moe_tta.plan import RoutingPlan, Select
from tests.kernels.cases import experts, make_plan, make_shape

SHAPE = make_shape(num_experts=4, layers=(1, 2, 5))
FULL = {
    "allow": ~experts(4, 0),
    "promote": experts(4, 1),
    "demote": experts(4, 2),
    "drop": experts(4, 1, 3),
    "bias": [1, 2, 3, 4],
    "target": [0, 0, 0.5, 0.5],
    "mix": 0.5,
    "memory": 3,
    "neighbours": 7,
    "select": Select.SAMPLE,
    "k_min": 2,
    "k_max": 3,
    "select_args": [1, 4, 0.5],
    "seed": -7,
    "scale": [1, 2, 3, 4],
    "renorm": 2,
}
NEUTRAL = {"k_min": 1, "scale": 1}


def slot_values(table, slot, layer):
    return {
        name: view[slot].tolist()
        for name, view in table.layer(layer)._asdict().items()
        if name != "packed"
    }


def neutral_values():
    return slot_values(PlanTable(SHAPE, 1, "cpu"), 0, 0)


def test_new_slots_are_neutral():
    table = PlanTable(SHAPE, 2, "cpu")
    for name, view in table.layer(1)._asdict().items():
        if name == "packed":
            continue
        assert (view == NEUTRAL.get(name, 0)).all()
    assert table.features(2) == Features.NONE


def test_write_fills_every_field_of_one_slot():
    table = PlanTable(SHAPE, 2, "cpu")
    table.write({2: make_plan(3, **FULL)})
    for layer in range(3):
        got = slot_values(table, 2, layer)
        assert got.pop("flags") == [1, 2 + 8, 4, 8]
        assert got == {name: FULL[name] for name in got}
        assert slot_values(table, 0, layer) == neutral_values()
        assert slot_values(table, 1, layer) == neutral_values()


def test_layers_are_kept_apart():
    table = PlanTable(SHAPE, 1, "cpu")
    bias = np.arange(12, dtype=np.float32).reshape(3, 4)
    table.write({1: RoutingPlan(bias=bias)})
    for layer in range(3):
        assert slot_values(table, 1, layer)["bias"] == bias[layer].tolist()


def test_rewriting_leaves_nothing_behind_and_moves_nothing():
    table = PlanTable(SHAPE, 1, "cpu")
    addresses = [view.data_ptr() for view in table.layer(2)]
    table.write({1: make_plan(3, **FULL)})
    table.write({1: RoutingPlan()})
    assert slot_values(table, 1, 2) == neutral_values()
    assert table.features(1) == Features.NONE
    assert [view.data_ptr() for view in table.layer(2)] == addresses
    assert table.layer(2) is table.layer(2)


@pytest.mark.parametrize("slots", [(1, 2, 3, 4), (4, 3, 2), (2, 3, 1, 5), (5, 1, 2)])
def test_slots_written_at_once_in_any_order(slots):
    plans = {slot: make_plan(3, bias=[slot, 0, 0, -slot]) for slot in slots}
    plans[slots[1]] = make_plan(3, **FULL)
    table, one_by_one = PlanTable(SHAPE, 5, "cpu"), PlanTable(SHAPE, 5, "cpu")
    table.write(plans)
    for slot, plan in plans.items():
        one_by_one.write({slot: plan})
    for layer in range(3):
        assert torch.equal(table.layer(layer).packed, one_by_one.layer(layer).packed)
        assert slot_values(table, slots[0], layer)["bias"][0] == slots[0]
    assert [table.features(slot) for slot in range(6)] == [
        one_by_one.features(slot) for slot in range(6)
    ]


@pytest.mark.parametrize("slot", [0, -1, 3])
def test_only_real_slots_can_be_written(slot):
    table = PlanTable(SHAPE, 2, "cpu")
    with pytest.raises(ValueError, match=r"slot -?\d cannot be written, 1\.\.2 can"):
        table.write({slot: RoutingPlan()})


@pytest.mark.parametrize(
    ("names", "features"),
    [
        (["allow"], Features.MASK),
        (["bias"], Features.BIAS),
        (["promote"], Features.PROMOTE),
        (["demote"], Features.PROMOTE),
        (["target", "mix"], Features.TARGET),
        (["select", "k_max", "select_args"], Features.SELECT | Features.SAMPLE),
        (["scale"], Features.WEIGHTS),
        (["drop"], Features.WEIGHTS),
        (["renorm"], Features.WEIGHTS),
        (["memory", "neighbours"], Features.RECALL),
        (list(FULL), Features.ALL),
    ],
)
def test_features(names, features):
    table = PlanTable(SHAPE, 1, "cpu")
    table.write({1: make_plan(3, **{name: FULL[name] for name in names})})
    assert table.features(1) == features


def test_feature_of_a_single_layer_counts():
    scale = np.ones((3, 4), np.float32)
    scale[2, 3] = 2
    table = PlanTable(SHAPE, 1, "cpu")
    table.write({1: RoutingPlan(scale=scale)})
    assert table.features(1) == Features.WEIGHTS


def test_types_and_size():
    table = PlanTable(SHAPE, 2, "cpu")
    types = {name: view.dtype for name, view in table.layer(0)._asdict().items()}
    assert types.pop("packed") == torch.uint8
    floats = ("bias", "target", "scale", "mix", "select_args")
    integers = ("select", "k_min", "k_max", "renorm", "memory", "neighbours")
    assert types == {
        "flags": torch.uint8,
        "seed": torch.int64,
        **dict.fromkeys(floats, torch.float32),
        **dict.fromkeys(integers, torch.int32),
    }
    numbers, arrays = 8 + 4 * (1 + 6 + 3), 4 * (3 * 4 + 1)
    assert (numbers, arrays) == (48, 52)  # each padded to 16
    assert table.nbytes == 3 * 3 * (48 + 64)
