# SPDX-License-Identifier: Apache-2.0
"""Which rows of a step ask for a memory, as kernels are told."""

import pytest

from moe_tta.vllm_plugin.rows import PlannedRequest
from tests.kernels.cases import make_plan
from tests.plugin.staged import make_rows, stage

KNN = make_plan(memory=1, neighbours=2).to_bytes()
OTHER = make_plan(bias=[1.0, 0, 0, 0]).to_bytes()
PLANS = {"knn": KNN, "other": OTHER}


@pytest.fixture
def rows():
    return make_rows()


def asking(rows):
    count = rows.asking[0].item()
    return rows.asking[1 : 1 + count].tolist()


def test_rows_whose_plan_names_a_memory_are_listed(rows):
    requests = {
        "all": PlannedRequest(4, ("knn",) * 3, PLANS),
        "last": PlannedRequest(3, ("other", "knn", None), PLANS),
        "never": PlannedRequest(3, ("other",) * 3, PLANS),
    }
    assert asking(rows) == []
    stage(rows, requests, [("plain", 2, 0), ("all", 4, 0), ("last", 3, 0)])
    assert asking(rows) == [2, 3, 4, 5, 8]
    stage(rows, requests, [("never", 1, 3), ("last", 1, 3), ("all", 1, 4)])
    assert asking(rows) == [2]
    stage(rows, requests, [("never", 1, 4), ("last", 1, 4)])
    assert asking(rows) == []
    stage(rows, requests, [("all", 2, 5), ("never", 30, 0)])
    assert asking(rows) == [0, 1]
    rows.clear()
    assert asking(rows) == []
    assert not rows.slots.any()


def test_every_row_may_ask(rows):
    requests = {"all": PlannedRequest(40, ("knn",) * 3, PLANS)}
    stage(rows, requests, [("all", 32, 0)])
    assert asking(rows) == list(range(32))
