# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the routing kernel equals the law over thousands of random plans.

Needs one CUDA device and no vLLM. Under a minute, compilation included.
"""

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from moe_tta.kernels.route_model import exp, reciprocal
from tests.kernels.random_plans import WORLDS, check, draw, draw_rows

PLANS = 160  # in each world: 5,280 in all
ROWS = (0, 1, 2, 7, 33, 256, 4096)
RARE = 0.01  # share of rows that rounding may decide
BLOCK = 1024


@pytest.mark.parametrize("index", WORLDS)
def test_equals_the_law(index):
    world = draw(index, PLANS, "cuda")
    excused = sum(check(world, draw_rows(world, rows)) for rows in ROWS)
    assert excused <= RARE * sum(ROWS)


def test_many_rows():
    world = draw(22, PLANS, "cuda")
    assert check(world, draw_rows(world, 65536)) <= RARE * 65536


@triton.jit
def _count_differing(count_ptr, first, BLOCK: tl.constexpr, RECIPROCAL: tl.constexpr):
    """Count float32 numbers, from the bits `first` on, with other results."""
    offset = tl.program_id(0).to(tl.int64) * BLOCK
    bits = (first + offset + tl.arange(0, BLOCK)).to(tl.int32)
    number = bits.to(tl.float32, bitcast=True)
    if RECIPROCAL:
        ours, cudas = reciprocal(number, True), tl.div_rn(1.0, number)
    else:
        ours, cudas = exp(number, True), libdevice.exp(number)
    differ = ours.to(tl.int32, bitcast=True) != cudas.to(tl.int32, bitcast=True)
    differ = differ & ((ours == ours) | (cudas == cudas))
    tl.atomic_add(count_ptr, tl.sum(differ.to(tl.int32), axis=0))


@pytest.mark.parametrize(
    ("inverts", "first", "end"),
    [
        pytest.param(False, 0, 1 << 32, id="exp of all numbers"),
        pytest.param(True, 0x00800000, 0x7E800000, id="reciprocal, 2^-126 to 2^126"),
    ],
)
def test_arithmetic_is_cudas(inverts, first, end):
    differing = torch.zeros(1, dtype=torch.int32, device="cuda")
    _count_differing[((end - first) // BLOCK,)](differing, first, BLOCK, inverts)
    assert int(differing) == 0
