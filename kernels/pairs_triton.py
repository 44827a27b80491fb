# SPDX-License-Identifier: Apache-2.0
"""The work around grouped products (`pairs.py`) as Triton kernels, launched.

All tensors are contiguous, and T is at least 1. Nothing is added atomically, so that
equal arguments give equal bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_tta.kernels.grouped_triton import multiply
from moe_tta.kernels.launch import Launcher
from moe_tta.kernels.pairs import PairOrder, PairWork
from moe_tta.kernels.pairs_order import order_pairs

_BLOCK = 1024  # elements of a program: 16 bytes of 16-bit floats a thread


def sum_pairs(
    pairs: torch.Tensor, order: PairOrder, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum pairs as `pairs.sum_pairs`, bit for bit."""
    (num_rows, width), hidden = order.places.shape, pairs.shape[1]
    total = pairs.new_empty(num_rows, hidden)
    weighted = weights is not None
    _sum(
        (num_rows, -(-hidden // _block(hidden)), 1),
        (pairs, total, order.places, weights if weighted else pairs),
        (),
        (hidden, width, pairs.dtype, weighted),
    )
    return total


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Activate as `pairs.silu_and_mul`, but for float32 rounding of the exponential."""
    inner = gate_up.shape[1] // 2
    product = gate_up.new_empty(len(gate_up), inner)
    grid = len(gate_up), -(-inner // _block(inner)), 1
    _activate(grid, (gate_up, product), (), (inner, gate_up.dtype))
    return product


def silu_and_mul_backward(
    gate_up: torch.Tensor,
    slope: torch.Tensor,
    weights: torch.Tensor,
    order: PairOrder,
    with_rows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return gradients as `pairs.silu_and_mul_backward`; `weights` are float32."""
    grad_weights = torch.empty_like(weights)
    grad_gate_up = torch.empty_like(gate_up) if with_rows else None
    _activate_backward(
        (len(gate_up), 1, 1),
        (
            *(gate_up, slope, weights, order.pairs, grad_weights),
            gate_up if grad_gate_up is None else grad_gate_up,
        ),
        (),
        (gate_up.shape[1] // 2, gate_up.dtype, with_rows),
    )
    return grad_weights, grad_gate_up


def _block(size: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(size))


def _sum_constants(hidden: int, width: int, dtype: torch.dtype, weighted: bool) -> dict:
    sizes = {"H": hidden, "K": width, "BLOCK_H": _block(hidden), "WEIGHTED": weighted}
    # each product and each sum is rounded, as in plain torch
    return {**sizes, "num_warps": 4, "enable_fp_fusion": False}


def _activate_constants(inner: int, *_: object) -> dict:
    return {"INNER": inner, "BLOCK_I": _block(inner), "num_warps": 4}


def _backward_constants(inner: int, dtype: torch.dtype, with_rows: bool) -> dict:
    return {**_activate_constants(inner), "WITH_ROWS": with_rows}


@triton.jit
def _sum_pairs(
    pairs_ptr,  # [T K, H]
    total_ptr,  # [T, H]
    places_ptr,  # [T, K] int32
    weights_ptr,  # [T, K] f32
    H: tl.constexpr,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], tl.float32)
    for column in tl.static_range(K):
        place = tl.load(places_ptr + row * K + column).to(tl.int64)
        where = pairs_ptr + place * H + dims
        part = tl.load(where, mask=dims < H, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = tl.load(weights_ptr + row * K + column) * part
        total += part
    total = total.to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * H + dims, total, mask=dims < H)


@triton.jit
def _silu_and_mul(
    gate_up_ptr,  # [T K, 2 I]
    product_ptr,  # [T K, I]
    INNER: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    where = gate_up_ptr + place * (2 * INNER) + dims
    gate = tl.load(where, mask=dims < INNER, other=0.0).to(tl.float32)
    up = tl.load(where + INNER, mask=dims < INNER, other=0.0).to(tl.float32)
    share = 1 / (1 + tl.exp(-gate))
    product = (gate * share * up).to(product_ptr.dtype.element_ty)
    tl.store(product_ptr + place * INNER + dims, product, mask=dims < INNER)


@triton.jit
def _silu_and_mul_backward(
    gate_up_ptr,  # [T K, 2 I]
    slope_ptr,  # [T K, I]
    weights_ptr,  # [T K] f32, by pair
    pairs_ptr,  # [T K] int32
    grad_weights_ptr,  # [T K] f32, by pair
    grad_gate_up_ptr,  # [T K, 2 I]
    INNER: tl.constexpr,
    BLOCK_I: tl.constexpr,
    WITH_ROWS: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    pair = tl.load(pairs_ptr + place)
    weight = tl.load(weights_ptr + pair)
    gate_up_ptr += place * (2 * INNER)
    grad_gate_up_ptr += place * (2 * INNER)
    slope_ptr += place * INNER
    total = tl.zeros([BLOCK_I], tl.float32)
    for first in tl.static_range(0, INNER, BLOCK_I):
        dims = first + tl.arange(0, BLOCK_I)
        inside = dims < INNER
        gate = tl.load(gate_up_ptr + dims, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(gate_up_ptr + INNER + dims, mask=inside, other=0.0).to(tl.float32)
        slope = tl.load(slope_ptr + dims, mask=inside, other=0.0).to(tl.float32)
        share = 1 / (1 + tl.exp(-gate))
        # as the forward pass rounded it
        product = (gate * share * up).to(gate_up_ptr.dtype.element_ty)
        total += product.to(tl.float32) * slope
        if WITH_ROWS:
            slope *= weight
            grad_gate = slope * up * share * (1 + gate * (1 - share))
            grad_up = slope * gate * share
            grad_type = grad_gate_up_ptr.dtype.element_ty
            tl.store(grad_gate_up_ptr + dims, grad_gate.to(grad_type), mask=inside)
            tl.store(
                grad_gate_up_ptr + INNER + dims, grad_up.to(grad_type), mask=inside
            )
    tl.store(grad_weights_ptr + pair, tl.sum(total, axis=0))


_sum = Launcher(_sum_pairs, _sum_constants)
_activate = Launcher(_silu_and_mul, _activate_constants)
_activate_backward = Launcher(_silu_and_mul_backward, _backward_constants)

TRITON = PairWork(order_pairs, multiply, sum_pairs, silu_and_mul, silu_and_mul_backward)
