# SPDX-License-Identifier: Apache-2.0
"""The adapter's kernels for experts; `test_triton.py` runs this in a process."""

import pytest
import torch

from moe_tta.kernels.pairs_triton import TRITON
from tests.kernels import expert_checks as checks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off where hardware rounds
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
DTYPES = torch.float32, HALF
# rows, experts, experts of a row
SHAPES = [(1, 4, 1), (1, 8, 8), (3, 60, 2), (5, 64, 8), (9, 3, 3), (7, 12, 5)]


@pytest.fixture(autouse=True)
def poison():
    """Make fresh outputs NaN and the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "num_experts", "width"),
    # one block of pairs, exactly one, several, more than are read at once
    [*SHAPES, (16, 64, 8), (300, 5, 2), (2100, 6, 4)],
)
def test_order(num_rows, num_experts, width, dtype):
    ids = checks.draw_ids(num_rows, num_experts, width).to(dtype)
    checks.check_order(TRITON, ids, num_experts, DEVICE)


def test_all_rows_may_choose_the_same_experts():
    checks.check_order(TRITON, torch.tensor([[3, 1]]).repeat(150, 1), 4, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [48, 1032])
@pytest.mark.parametrize(("num_rows", "num_experts", "width"), SHAPES)
def test_sums(num_rows, num_experts, width, hidden, dtype):
    ids = checks.draw_ids(num_rows, num_experts, width)
    checks.check_sums(TRITON, ids, num_experts, hidden, dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    # rows, experts, experts of a row, in, out: less than a tile, whole ones, several
    [(3, 4, 1, 16, 8), (9, 3, 3, 64, 256), (140, 5, 2, 72, 264), (300, 2, 1, 128, 32)],
    ids=str,
)
def test_products(size, dtype):
    *ids, inner, outer = size
    drawn = checks.draw_ids(*ids)
    checks.check_products(TRITON, drawn, inner, outer, dtype, DEVICE)


def test_products_of_experts_without_rows():
    ids = torch.tensor([[6, 2]]).repeat(70, 1)
    checks.check_products(TRITON, ids, 24, 40, DTYPES[1], DEVICE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("inner", [40, 1032])
@pytest.mark.parametrize(("num_rows", "num_experts", "width"), SHAPES[:4])
def test_activation(num_rows, num_experts, width, inner, dtype):
    ids = checks.draw_ids(num_rows, num_experts, width)
    checks.check_activation(TRITON, ids, num_experts, inner, dtype, DEVICE)


def test_activation_far_from_zero_is_finite():
    gate_up = torch.tensor([[-1e4, 1e4, 1.0, 1.0]], device=DEVICE)
    assert TRITON.silu_and_mul(gate_up).tolist() == [[0.0, 1e4]]
    ones, ids = torch.ones(1, 2, device=DEVICE), torch.tensor([[0]], device=DEVICE)
    order = TRITON.order_pairs(ids, 1)
    chosen, grad = TRITON.silu_and_mul_backward(gate_up, ones, ones[:, :1], order)
    assert chosen.tolist() == [[1e4]]
    assert grad.tolist() == [[0.0, 1.0, 0.0, 1e4]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    # rows, H, I, experts, experts of a row
    [(1, 48, 40, 4, 1), (1, 16, 8, 8, 8), (13, 48, 40, 6, 3), (6, 64, 1032, 5, 2)],
    ids=str,
)
def test_layer(size, dtype):
    checks.check_layer(TRITON, *size, dtype=dtype, device=DEVICE)
