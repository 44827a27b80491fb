# SPDX-License-Identifier: Apache-2.0
"""Random plans for the interpreted kernel; `test_triton.py` runs this.

`tests/gpu/test_route_kernel.py` checks many more of them, compiled.
"""

import pytest

from tests.kernels.drawing import ROUTERS
from tests.kernels.random_plans import check, draw, draw_rows


@pytest.mark.parametrize("index", range(len(ROUTERS)))
def test_random_plans(index):
    world = draw(index, 32, "cpu", most_experts=128)
    excused = sum(check(world, draw_rows(world, rows)) for rows in (0, 1, 2, 32))
    assert excused <= 2
