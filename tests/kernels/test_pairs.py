# SPDX-License-Identifier: Apache-2.0
"""The work around grouped products in plain torch, by hand and by autograd."""

import math

import pytest
import torch

from moe_tta.kernels.grouped import grouped_experts
from moe_tta.kernels.pairs import (
    PLAIN,
    silu_and_mul,
    silu_and_mul_backward,
    spread_rows,
)
from tests.kernels import expert_checks as checks

# three rows of two experts each; expert 1 has none
ORDER = PLAIN.order_pairs(torch.tensor([[2, 0], [0, 3], [3, 2]]), 4)


def test_order_by_hand():
    assert ORDER.pairs.tolist() == [1, 2, 0, 5, 3, 4]
    assert ORDER.places.tolist() == [[2, 0], [1, 4], [5, 3]]
    assert ORDER.ends.tolist() == [2, 2, 4, 6]
    assert {part.dtype for part in ORDER} == {torch.int32}


def test_rows_and_sums_by_hand():
    rows = torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0]])
    spread = spread_rows(rows, ORDER)
    assert spread[:, 0].tolist() == [1, 2, 1, 3, 2, 3]
    assert torch.equal(PLAIN.sum_pairs(spread, ORDER), 2 * rows)
    weights = torch.tensor([[1.0, 2.0], [0.0, 1.0], [3.0, 0.5]])
    wanted = rows * torch.tensor([[3.0], [1.0], [3.5]])
    assert torch.equal(PLAIN.sum_pairs(spread, ORDER, weights), wanted)


def test_sums_are_rounded_once():
    """In bfloat16 1 + 2^-8 is 1: from left to right in it the sum would stay 1."""
    order = PLAIN.order_pairs(torch.tensor([[0, 1, 2]]), 3)
    pairs = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    assert PLAIN.sum_pairs(pairs, order).item() == 1 + 2.0**-7


def test_activation_by_hand():
    """silu(ln 3) = 3/4 ln 3, and its slope is 3/4 (1 + ln 3 / 4)."""
    log = math.log(3)
    gate_up = torch.tensor([[log, 0.0, 2.0, 5.0]], dtype=torch.float64)
    wanted = torch.tensor([[1.5 * log, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(silu_and_mul(gate_up), wanted)
    order = PLAIN.order_pairs(torch.tensor([[0]]), 1)
    slope, weights = torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[0.5]])
    chosen, grad = silu_and_mul_backward(gate_up, slope, weights, order)
    torch.testing.assert_close(chosen, wanted[:, :1])
    slopes = [0.75 * (1 + log / 4), 0.5 * 5, 0.75 * log / 2, 0.0]
    torch.testing.assert_close(grad, torch.tensor([slopes], dtype=torch.float64))


def test_activation_far_from_zero_is_finite():
    gate_up = torch.tensor([[-1e4, 1e4, 1.0, 1.0]])
    assert silu_and_mul(gate_up).tolist() == [[0.0, 1e4]]
    order = PLAIN.order_pairs(torch.tensor([[0]]), 1)
    ones = torch.ones(1, 2)
    chosen, grad = silu_and_mul_backward(gate_up, ones, torch.ones(1, 1), order)
    assert chosen.tolist() == [[1e4]]
    assert grad.tolist() == [[0.0, 1.0, 0.0, 1e4]]


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_layer_is_the_loop(width):
    """`grouped_mm` knows no float64: float32, as near to it as the loop."""
    size = 13, 48, 40, 8, width
    checks.check_layer(PLAIN, *size, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("rows", "backward"), [(False, 1), (True, 2)], ids=["weights", "rows"]
)
def test_no_more_products_than_gradients_ask_for(monkeypatch, rows, backward):
    made, product = [], torch.nn.functional.grouped_mm

    def count(*args, **kwargs):
        made.append(args)
        return product(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", count)
    layer = checks.draw_layer(5, 16, 8, 4, 2, torch.float32, "cpu")
    hidden, ids, weights, *matrices = layer
    hidden.requires_grad_(rows)
    weights.requires_grad_()
    grouped_experts(hidden, ids, weights, *matrices, PLAIN).sum().backward()
    assert len(made) == 2 + backward
    assert (hidden.grad is not None) == rows
    alone = weights.detach().clone().requires_grad_()
    checks.loop(hidden.detach(), ids, alone, *matrices).sum().backward()
    torch.testing.assert_close(weights.grad, alone.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_kept_for_backward(dtype):
    """Gate and up of each pair, its weight and its two numbers; ends of experts."""
    num_rows, hidden, inner, num_experts, width = 12, 32, 24, 6, 3
    layer = checks.draw_layer(num_rows, hidden, inner, num_experts, width, dtype, "cpu")
    weights = {part.data_ptr() for part in layer[3:]}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.nbytes, tensor
        return tensor

    hidden, *rest = layer
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        grouped_experts(hidden.requires_grad_(), *rest, PLAIN)
    pairs = num_rows * width * (2 * inner * dtype.itemsize + 4 + 4 + 4)
    assert sum(size for size, _ in kept.values()) == pairs + 4 * num_experts
