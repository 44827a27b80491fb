# SPDX-License-Identifier: Apache-2.0
"""Norm and rotation of one row's heads as two tiles [heads, D/2], in Triton.

Numbers i and i + D/2 of a head are a pair: one tile holds the first of each pair, the
other the second.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tile(
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Return which number of a half and of the row an element is, and if it exists."""
    heads = tl.arange(0, BLOCK)[:, None]
    dims = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (heads < COUNT) & (dims < DIM // 2)
    return dims, heads * DIM + dims, inside


@triton.jit
def _load_halves(ptr, places, inside, HALF: tl.constexpr):
    low = tl.load(ptr + places, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(ptr + places + HALF, mask=inside, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _load_weight(ptr, dims, places, inside, HALF: tl.constexpr, PER_HEAD: tl.constexpr):
    if PER_HEAD:
        low, high = _load_halves(ptr, dims, dims < HALF, HALF)
    else:
        low, high = _load_halves(ptr, places, inside, HALF)
    return low, high


@triton.jit
def _store_halves(ptr, places, inside, low, high, HALF: tl.constexpr):
    dtype = ptr.dtype.element_ty
    tl.store(ptr + places, low.to(dtype), mask=inside)
    tl.store(ptr + places + HALF, high.to(dtype), mask=inside)


@triton.jit
def _mean(numbers, COUNT: tl.constexpr, DIM: tl.constexpr, PER_HEAD: tl.constexpr):
    """Mean over what is normed together, of sums of the two halves."""
    total = tl.sum(numbers, axis=1, keep_dims=True)
    if PER_HEAD:
        total /= DIM
    else:
        total = tl.sum(total, axis=0, keep_dims=True) / (COUNT * DIM)
    return total


@triton.jit
def turn_part(
    from_ptr,
    to_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    NORMED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Norm and turn COUNT heads of one row, in float32; rounded when stored."""
    HALF: tl.constexpr = DIM // 2
    dims, places, inside = _tile(COUNT, DIM, BLOCK, BLOCK_HALF)
    low, high = _load_halves(from_ptr, places, inside, HALF)
    if NORMED:
        size = _mean(low * low + high * high, COUNT, DIM, PER_HEAD)
        scale = tl.rsqrt(size + EPS)
        w_low, w_high = _load_weight(weight_ptr, dims, places, inside, HALF, PER_HEAD)
        low = low * scale * w_low
        high = high * scale * w_high
    cos_low, cos_high = _load_halves(cos_ptr, dims, dims < HALF, HALF)
    sin_low, sin_high = _load_halves(sin_ptr, dims, dims < HALF, HALF)
    turned_low = low * cos_low - high * sin_low
    turned_high = high * cos_high + low * sin_high
    _store_halves(to_ptr, places, inside, turned_low, turned_high, HALF)


@triton.jit
def turn_part_back(
    grad_ptr,
    from_ptr,
    to_ptr,
    cos_ptr,
    sin_ptr,
    weight_ptr,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    NORMED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Take the gradient of `turn_part`'s result back to what it was given.

    With y = w x / s, s the root of the mean square: dx = (w dy - x mean(x w dy) / s^2)
    / s.
    """
    HALF: tl.constexpr = DIM // 2
    dims, places, inside = _tile(COUNT, DIM, BLOCK, BLOCK_HALF)
    grad_low, grad_high = _load_halves(grad_ptr, places, inside, HALF)
    cos_low, cos_high = _load_halves(cos_ptr, dims, dims < HALF, HALF)
    sin_low, sin_high = _load_halves(sin_ptr, dims, dims < HALF, HALF)
    low = grad_low * cos_low + grad_high * sin_high
    high = grad_high * cos_high - grad_low * sin_low
    if NORMED:
        w_low, w_high = _load_weight(weight_ptr, dims, places, inside, HALF, PER_HEAD)
        low *= w_low
        high *= w_high
        x_low, x_high = _load_halves(from_ptr, places, inside, HALF)
        size = _mean(x_low * x_low + x_high * x_high, COUNT, DIM, PER_HEAD)
        scale = tl.rsqrt(size + EPS)
        along = _mean(low * x_low + high * x_high, COUNT, DIM, PER_HEAD)
        along *= scale * scale
        low = scale * (low - x_low * along)
        high = scale * (high - x_high * along)
    _store_halves(to_ptr, places, inside, low, high, HALF)


@triton.jit
def copy_part(
    from_ptr,
    to_ptr,
    COUNT: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    """Copy COUNT heads of one row."""
    HALF: tl.constexpr = DIM // 2
    _, places, inside = _tile(COUNT, DIM, BLOCK, BLOCK_HALF)
    low, high = _load_halves(from_ptr, places, inside, HALF)
    _store_halves(to_ptr, places, inside, low, high, HALF)
