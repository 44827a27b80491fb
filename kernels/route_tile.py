# SPDX-License-Identifier: Apache-2.0
"""Many rows of 16-bit logits by the model's own rule, ranked by one integer each.

An expert's logit and its number fit 32 bits together, and one integer maximum finds
the best expert and settles ties. Stock vLLM ranks the float32 softmax instead. Both
orders are the same wherever neighbours in rank have equal logits, or logits so far
apart that no rounding of the softmax can swap or equal them. A tile whose rows are not
all like that is left to the caller.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_tta.kernels.route_model import exp
from moe_tta.kernels.route_ranks import INF

_LOWEST = tl.constexpr(-(2**31))  # below every key
_LOW_BITS = tl.constexpr(0xFFFF)
# Softmax rounds a logit's distance to the best, at most 80 below, to 2^-18, the
# exponential to 2 units and the product to 1, of 2^-24 each: 2^-17 together for two
# neighbours in rank, and a distance of 2^-15 is beyond that
_APART = tl.constexpr(2.0**-15)
_NORMAL = tl.constexpr(80.0)  # exp(-80) / 512 experts is still a normal float32


@triton.jit
def route_model_tile(
    weights_ptr,  # [ROWS, WIDTH] f32
    ids_ptr,  # [ROWS, WIDTH] int32
    logits_ptr,  # [ROWS, >= E] bf16 or f16
    row_stride,
    column_stride,
    live,  # [ROWS], rows that exist
    top_k,  # below E
    ROWS: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    SKIP_UNUSED: tl.constexpr,
    RUN: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write all columns of neighbouring rows; return whether all of them are sure.

    If not, nothing is written. `SumOrder` is one of rows that fit a warp.
    """
    experts = tl.arange(0, BLOCK_E)[None, :]
    rows = tl.arange(0, ROWS)[:, None]
    logits_ptr += rows.to(tl.int64) * row_stride
    where = logits_ptr + experts.to(tl.int64) * column_stride
    mask = live[:, None] & (experts < E)
    logits = tl.load(where, mask=mask, other=0.0)
    order = _flip(logits.to(tl.int16, bitcast=True).to(tl.int32))
    keys = tl.where(experts < E, (order << 16) | _number(experts), _LOWEST)
    best_key = tl.max(keys, axis=1)
    best = _logit(best_key, logits.dtype)
    total = _sum_powers(
        *(logits_ptr, column_stride, best[:, None], live, ROWS, E, RUN, THREADS),
        *(LOADS, EXACT),
    )
    scale = tl.div_rn(1.0, total)

    tail = tl.arange(0, BLOCK_W)[None, :]
    picked = tl.zeros([ROWS, BLOCK_W], tl.int32)
    sure = total < INF  # no NaN and no infinity
    chosen = tl.zeros([ROWS], tl.float32)
    key = best_key
    # a copy of `key` itself would be lost: Triton 3.6 and 3.7 return its first value
    edge = key >> 16
    for rank in range(top_k):
        edge = key >> 16
        picked = tl.where(tail == rank, key[:, None], picked)
        keys = tl.where(keys == key[:, None], _LOWEST, keys)
        after = tl.max(keys, axis=1)
        sure = sure & ((after >> 16 == edge) | _apart(key, after, logits.dtype))
        if RENORMALIZES:
            chosen += exp(_logit(key, logits.dtype) - best, EXACT) * scale
        key = after
    # of the experts left out, equals of the last one chosen have higher numbers
    below = tl.max(tl.where(keys >> 16 == edge[:, None], _LOWEST, keys), axis=1)
    sure = sure & ((below == _LOWEST) | _apart(edge << 16, below, logits.dtype))
    sure = sure & (best - _logit(edge << 16, logits.dtype) <= _NORMAL)
    all_sure = tl.min((sure | (live == 0)).to(tl.int32), axis=0) > 0

    scores = exp(_logit(picked, logits.dtype) - best[:, None], EXACT) * scale[:, None]
    weights = tl.where(tail < top_k, scores, 0.0)
    if RENORMALIZES:
        weights *= tl.div_rn(1.0, chosen)[:, None]
    unused = tl.full([ROWS, BLOCK_W], -1, tl.int32)
    if not SKIP_UNUSED:
        unused += 1 + _number(best_key)[:, None]
    ids = tl.where(tail < top_k, _number(picked), unused)
    cells = rows * WIDTH + tail
    mask = live[:, None] & (tail < WIDTH)
    if all_sure:
        tl.store(weights_ptr + cells, weights, mask=mask)
        tl.store(ids_ptr + cells, ids, mask=mask)
    return all_sure


@triton.jit
def _sum_powers(
    logits_ptr,  # [ROWS, 1], each row's first logit
    column_stride,
    best,  # [ROWS, 1] f32
    live,  # [ROWS]
    ROWS: tl.constexpr,
    E: tl.constexpr,
    RUN: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Sum exp(logits - best) [ROWS] in the order of `SumOrder`."""
    threads = tl.arange(0, THREADS)[None, :]
    sums = tl.zeros([ROWS, THREADS], tl.float32)
    for load in tl.static_range(LOADS):
        for step in tl.static_range(RUN):
            column = (load * THREADS + threads) * RUN + step
            where = logits_ptr + column.to(tl.int64) * column_stride
            mask = live[:, None] & (column < E)
            logits = tl.load(where, mask=mask, other=-INF).to(tl.float32)
            sums += exp(logits - best, EXACT)
    for level in tl.static_range(10):
        if THREADS >> level > 1:  # the upper half meets the lower one
            sums = tl.reshape(sums, [ROWS, 2, THREADS >> (level + 1)])
            sums = tl.sum(sums, axis=1)
    return tl.sum(sums, axis=1)


@triton.jit
def _flip(bits):
    """Map a 16-bit float's bits to an integer of the same order, or back."""
    return bits ^ ((bits >> 31) & 0x7FFF)


@triton.jit
def _number(keys):
    """Map a key to its expert, or an expert to its bits: low numbers rank first."""
    return (keys & _LOW_BITS) ^ _LOW_BITS


@triton.jit
def _apart(above, below, dtype: tl.constexpr):
    return _logit(above, dtype) - _logit(below, dtype) >= _APART


@triton.jit
def _logit(keys, dtype: tl.constexpr):
    bits = _flip(keys >> 16).to(tl.int16)
    return bits.to(dtype, bitcast=True).to(tl.float32)
