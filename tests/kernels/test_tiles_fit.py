# SPDX-License-Identifier: Apache-2.0
"""When a launch takes several rows together."""

import pytest
import torch

pytest.importorskip("triton")

from moe_tta.kernels.route import (
    MANY_ROWS,
    MANY_WITH_PLANS,
    RoutingKernel,
    _fits_tiles,
)
from moe_tta.kernels.scores import RoutingRule
from tests.kernels.cases import make_shape, make_table


@pytest.mark.parametrize(
    ("num_tokens", "num_planned", "fits"),
    [
        (MANY_ROWS - 1, 0, False),
        (MANY_ROWS, 0, True),
        (MANY_ROWS, 1, False),
        (MANY_WITH_PLANS - 1, 1, False),
        (MANY_WITH_PLANS, 1, True),
        (MANY_WITH_PLANS, MANY_WITH_PLANS // 2, True),
        (MANY_WITH_PLANS, MANY_WITH_PLANS // 2 + 1, False),
    ],
)
def test_rows_with_plans_ask_for_rows_one_by_one(num_tokens, num_planned, fits):
    assert _fits_tiles(num_tokens, num_planned) is fits


@pytest.mark.parametrize(
    ("num_tokens", "num_planned", "taken"),
    [
        (MANY_ROWS - 1, 0, (1, 0)),
        (MANY_ROWS, 0, (8, 4)),
        (MANY_WITH_PLANS, 0, (16, 2)),
        (MANY_WITH_PLANS, 1, (4, 0)),
    ],
)
def test_runs_are_for_steps_without_plans(num_tokens, num_planned, taken):
    shape = make_shape(num_experts=64, top_k=8)
    table, rule = make_table(shape).layer(0), RoutingRule.from_shape(shape)
    kernel = RoutingKernel(table, rule, 8, 0)
    rows = torch.empty(num_tokens, 64, dtype=torch.bfloat16)
    assert kernel._rows_and_lanes(rows, num_planned) == taken
    assert kernel._rows_and_lanes(rows.float(), num_planned) == (1, 0)
    apart = torch.empty(64, num_tokens, dtype=torch.bfloat16).T
    assert kernel._rows_and_lanes(apart, num_planned)[1] == 0
