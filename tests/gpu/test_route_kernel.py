# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the routing kernel equals the law over thousands of random plans.

Needs one CUDA device and no vLLM. Under a minute, compilation included.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from tests.kernels.random_plans import WORLDS, check, draw, draw_rows

PLANS = 160  # in each world: 5,280 in all
ROWS = (0, 1, 2, 7, 33, 256, 4096)
RARE = 0.01  # share of rows that rounding may decide


@pytest.mark.parametrize("index", WORLDS)
def test_equals_the_law(index):
    world = draw(index, PLANS, "cuda")
    excused = sum(check(world, draw_rows(world, rows)) for rows in ROWS)
    assert excused <= RARE * sum(ROWS)


def test_many_rows():
    world = draw(22, PLANS, "cuda")
    assert check(world, draw_rows(world, 65536)) <= RARE * 65536
