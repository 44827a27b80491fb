# SPDX-License-Identifier: Apache-2.0
"""What a step writes for its rows, and that a step like the last one writes nothing."""

import numpy as np
import pytest

from moe_tta.plan import Select
from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.rows import PlannedRequest
from moe_tta.vllm_plugin.versions import Version, VersionedRequest
from tests.kernels.cases import make_plan
from tests.plugin.staged import make_rows, stage

PLANS = {
    "a": make_plan(bias=[1.0, 0, 0, 0]).to_bytes(),
    "b": make_plan(bias=[0, 1.0, 0, 0]).to_bytes(),
    "drawn": make_plan(
        select=Select.SAMPLE, select_args=(1.0, 2.0, 1.0), k_max=2
    ).to_bytes(),
}
REQUESTS = {
    "x": PlannedRequest(2, ("a",) * 3, PLANS),
    "y": PlannedRequest(2, (None, "b", "a"), PLANS),
}


@pytest.fixture
def rows():
    return make_rows()


@pytest.fixture
def copied(monkeypatch):
    """The lengths of what is copied to the device."""
    lengths, copy = [], compat.copy_to_device

    def counting(source, target):
        lengths.append(len(source))
        copy(source, target)

    monkeypatch.setattr(compat, "copy_to_device", counting)
    return lengths


def names(rows, count):
    """Return the plans that the device's first rows obey."""
    by_slot = {slot: name for name, slot in rows.slot_table.pinned.items()}
    return [by_slot.get(slot) for slot in rows.slots[:count].tolist()]


def test_decode_steps_of_the_same_batch_copy_nothing(rows, copied):
    batch = [("plain", 1), ("x", 1), ("y", 1)]
    for position in range(2, 6):
        stage(rows, REQUESTS, [(name, count, position) for name, count in batch])
        assert names(rows, 3) == [None, "a", "a"]
        assert copied == [3]
    assert rows.num_planned == 2


def test_decode_steps_of_the_same_batch_ask_nobody(rows, monkeypatch):
    batch = [("plain", 1, 9), ("x", 1, 2), ("y", 1, 2)]
    stage(rows, REQUESTS, batch)
    monkeypatch.setattr(PlannedRequest, "runs", None)
    stage(rows, REQUESTS, [(name, count, at + 1) for name, count, at in batch])
    assert names(rows, 3) == [None, "a", "a"]


NUDGED = PlanEdit({"bias": np.array([[0, 0, 1, 0]], np.float32)})
OTHER = PlannedRequest(2, ("b",) * 3, PLANS)
VERSIONED = VersionedRequest(REQUESTS["x"], [Version(5, NUDGED)])


@pytest.mark.parametrize(
    ("requests", "batch"),
    [
        pytest.param({}, [("x", 1, 4), ("y", 1, 1)], id="read again"),
        pytest.param({}, [("x", 2, 4), ("y", 1, 4)], id="another count"),
        pytest.param({}, [("x", 1, 4), ("plain", 1, 4)], id="another batch"),
        pytest.param({"x": OTHER}, [("x", 1, 4), ("y", 1, 4)], id="an id come again"),
        pytest.param({"y": None}, [("x", 1, 4), ("y", 1, 4)], id="a plan gone"),
        pytest.param({"x": VERSIONED}, [("x", 1, 6), ("y", 1, 4)], id="a version"),
    ],
)
def test_a_step_unlike_the_one_before_is_staged_anew(requests, batch):
    """What a step writes does not depend on the step before."""
    before, fresh = make_rows(), make_rows()
    stage(before, REQUESTS, [("x", 1, 3), ("y", 1, 3)])
    now = {**REQUESTS, **requests}
    now = {name: request for name, request in now.items() if request is not None}
    for rows in (before, fresh):
        stage(rows, now, batch)
    count = sum(number for _, number, _ in batch)
    assert names(before, count) == names(fresh, count)
    assert names(before, count) != ["a", "a"]


@pytest.mark.parametrize(
    ("chunks", "want"),
    [
        ([("y", 1, 3), ("x", 1, 3), ("plain", 1, 3)], ["a", "a", None]),
        ([("x", 1, 3), ("plain", 2, 3)], ["a", None, None]),
        ([("x", 1, 3), ("y", 1, 1), ("plain", 1, 3)], ["a", "b", None]),
        ([("plain", 1, 3), ("x", 2, 3)], [None, "a", "a"]),
        ([("plain", 3, 3)], [None, None, None]),
    ],
    ids=["order", "gone", "plan", "count", "none"],
)
def test_what_changes_is_written(rows, chunks, want):
    stage(rows, REQUESTS, [("plain", 1, 2), ("x", 1, 2), ("y", 1, 2)])
    stage(rows, REQUESTS, chunks)
    assert names(rows, 3) == want
    assert rows.num_planned == sum(name is not None for name in want)
    assert not rows.slots[3:].any()


def test_a_version_of_the_same_rows_is_written(rows):
    stage(rows, REQUESTS, [("x", 1, 4)])
    later = {"x": PlannedRequest(2, ("b",) * 3, PLANS)}
    stage(rows, later, [("x", 1, 5)])
    assert names(rows, 1) == ["b"]


def test_draws_are_told_every_position(rows):
    requests = {"x": PlannedRequest(2, ("drawn",) * 3, PLANS)}
    for position in (4, 5, 6):
        stage(rows, requests, [("x", 1, position)])
        assert rows.positions[0] == position


def test_rows_given_back_are_written_again(rows):
    stage(rows, REQUESTS, [("x", 1, 4)])
    rows.clear()
    assert not rows.slots.any()
    stage(rows, REQUESTS, [("x", 1, 5)])
    assert names(rows, 1) == ["a"]
