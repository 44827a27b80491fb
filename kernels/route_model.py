# SPDX-License-Identifier: Apache-2.0
"""A row of the routing kernel by the model's own rule, as stock vLLM rounds them.

vLLM's `topk_softmax` (csrc/libtorch_stable/moe/topk_softmax_kernels.cu, 0.32.0) ranks
the float32 softmax, whose sum it takes in an order that depends on how a row is spread
over threads. The same order gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from moe_tta.kernels.route_ranks import INF, LOWEST, UNRANKED, highest

_WARP = 32
_BLOCK = 256


class SumOrder(NamedTuple):
    """How stock vLLM spreads one row's experts over threads.

    Each of `THREADS` sums `LOADS` runs of `RUN` neighbouring experts, one after the
    other; then sums of threads meet in a tree. `IN_WARP`: one warp or less holds the
    row, and halves meet (butterfly); otherwise a block of `THREADS` holds it,
    neighbours meet in each warp, and warps follow one another.
    """

    RUN: int
    THREADS: int
    LOADS: int
    IN_WARP: bool

    @staticmethod
    def of(num_experts: int, dtype: torch.dtype) -> SumOrder:
        """Return the order for a row of `num_experts` logits of `dtype`."""
        size = dtype.itemsize
        if num_experts & (num_experts - 1) == 0 and num_experts <= 512:
            run = min(16 // size, num_experts)
        elif num_experts in (192, 320, 384, 448, 576):
            run = 8 // size if size == 4 else 4 // size
        else:
            return SumOrder(1, _BLOCK, -(-num_experts // _BLOCK), False)
        loads = max(1, num_experts // (run * _WARP))
        return SumOrder(run, num_experts // (run * loads), loads, True)


@triton.jit
def route_model_row(
    weights_ptr,  # [WIDTH] f32
    ids_ptr,  # [WIDTH] int32
    logits,  # [BLOCK_E] f32
    logits_ptr,  # the same, [>= E]
    column_stride,
    top_k,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    SKIP_UNUSED: tl.constexpr,
    RUN: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
    IN_WARP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write all columns of the row."""
    experts = tl.arange(0, BLOCK_E)
    logits = tl.where(experts < E, logits, -INF)
    best = highest(logits)
    total = _sum_powers(
        logits_ptr, column_stride, best, E, RUN, THREADS, LOADS, IN_WARP, EXACT
    )
    scores = exp(logits - best, EXACT) * tl.div_rn(1.0, total)
    # as vLLM: NaN and infinity count as 0
    scores = tl.where(tl.abs(scores) < INF, scores, 0.0)
    # from 0 on, bits have the numbers' order
    scores = tl.where(experts < E, scores.to(tl.int32, bitcast=True), LOWEST)

    tail = tl.arange(0, BLOCK_W)
    weights = tl.zeros([BLOCK_W], tl.float32)
    ids = tl.full([BLOCK_W], -1, tl.int32)
    chosen = 0.0
    for rank in range(top_k):
        bits = tl.max(scores, axis=0)
        pick = tl.min(tl.where(scores == bits, experts, UNRANKED), axis=0)
        top = bits.to(tl.float32, bitcast=True)
        # the first id stands in unused columns too, until others overwrite it
        taken = tail == rank
        if not SKIP_UNUSED:
            taken = taken | (rank == 0)
        ids = tl.where(taken, pick, ids)
        weights = tl.where(tail == rank, top, weights)
        scores = tl.where(experts == pick, LOWEST, scores)
        chosen += top
    if RENORMALIZES:
        weights *= tl.div_rn(1.0, tl.where(chosen > 0, chosen, 1.0))
    tl.store(weights_ptr + tail, weights, mask=tail < WIDTH)
    tl.store(ids_ptr + tail, ids, mask=tail < WIDTH)


@triton.jit
def _sum_powers(
    logits_ptr,
    column_stride,
    best,
    E: tl.constexpr,
    RUN: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
    IN_WARP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Sum exp(logits - best) in the order of `SumOrder`."""
    threads = tl.arange(0, THREADS)
    sums = tl.zeros([THREADS], tl.float32)
    for load in tl.static_range(LOADS):
        for step in tl.static_range(RUN):
            column = (load * THREADS + threads) * RUN + step
            where = logits_ptr + column.to(tl.int64) * column_stride
            logits = tl.load(where, mask=column < E, other=-INF).to(tl.float32)
            sums += exp(logits - best, EXACT)
    return _sum_halves(sums, THREADS) if IN_WARP else _sum_block(sums, THREADS)


@triton.jit
def _sum_halves(sums, COUNT: tl.constexpr):
    """Add the upper half to the lower one until one number is left."""
    for level in tl.static_range(10):
        if COUNT >> level > 1:
            sums = tl.reshape(sums, [2, COUNT >> (level + 1)])
            sums = tl.sum(sums, axis=0)
    return tl.sum(sums, axis=0)


@triton.jit
def _sum_block(sums, COUNT: tl.constexpr):
    """Add neighbours within each warp of 32, then the warps one after the other."""
    for level in tl.static_range(5):
        sums = tl.reshape(sums, [COUNT >> (level + 1), 2])
        sums = tl.sum(sums, axis=1)
    warps = tl.arange(0, COUNT // 32)
    total = 0.0
    for warp in tl.static_range(COUNT // 32):
        total += tl.sum(tl.where(warps == warp, sums, 0.0), axis=0)
    return total


@triton.jit
def exp(values, EXACT: tl.constexpr):
    """CUDA's `expf`, where Triton's own is an approximation; NumPy interpreted.

    The same operations as CUDA's, of which Triton's compiler makes one more: it does
    not take the bounds into the multiply-add before them.
    """
    if EXACT:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 part, shifted, whole, rest, power, scale;
            .reg .b32 bits;
            fma.rn.ftz.sat.f32 part, $1, 0f3BBB989D, 0f3F000000;
            fma.rm.ftz.f32 shifted, part, 0f437C0000, 0f4B400001;
            sub.f32 whole, 0f4B40007F, shifted;
            fma.rn.ftz.f32 rest, $1, 0f3FB8AA3B, whole;
            fma.rn.ftz.f32 rest, $1, 0f32A57060, rest;
            ex2.approx.ftz.f32 power, rest;
            mov.b32 bits, shifted;
            shl.b32 bits, bits, 23;
            mov.b32 scale, bits;
            mul.f32 $0, power, scale;
            }""",
            "=f,f",
            [values],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.exp(values)


@triton.jit
def reciprocal(values, EXACT: tl.constexpr):
    """1 / values, correctly rounded, of normal numbers whose reciprocal is normal.

    CUDA's own division without the branch for other numbers.
    """
    if EXACT:
        return tl.inline_asm_elementwise(
            """{
            .reg .f32 near, off;
            rcp.approx.ftz.f32 near, $1;
            fma.rn.f32 off, $1, near, 0fBF800000;
            neg.f32 off, off;
            fma.rn.f32 $0, near, off, near;
            }""",
            "=f,f",
            [values],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.div_rn(1.0, values)
