# SPDX-License-Identifier: Apache-2.0
"""When a launch takes several rows together."""

import pytest

pytest.importorskip("triton")

from moe_tta.kernels.route import MANY_ROWS, MANY_WITH_PLANS, _fits_tiles


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
