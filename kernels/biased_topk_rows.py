# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `biased_topk.py`: tiles of rows, with one lane per expert."""

from __future__ import annotations

import triton
import triton.language as tl

from moe_tta.kernels.route_model import exp
from moe_tta.kernels.route_ranks import INF, ordered_bits

_TAKEN = tl.constexpr(-(1 << 62))  # below every key


@triton.jit(do_not_specialize=["num_rows"])
def choose_experts(
    logits_ptr,  # [T, E]
    slots_ptr,  # [T]
    bias_ptr,  # [S, E] f32
    weights_ptr,  # [T, K] f32
    ids_ptr,  # [T, K] int64
    num_rows,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    BIASED: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write weights and ids of ROWS rows."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, BLOCK_E)[None, :]
    logits = _load_logits(
        logits_ptr,
        slots_ptr,
        bias_ptr,
        rows,
        num_rows,
        E,
        BLOCK_E,
        BIASED,
        BIAS_STRIDE,
    )
    scores = _softmax(logits, EXACT)
    # ties go to the lowest id; all keys are distinct
    keys = ordered_bits(logits).to(tl.int64) * BLOCK_E + (BLOCK_E - 1 - experts)
    keys = tl.where(experts < E, keys, _TAKEN)
    columns = tl.arange(0, BLOCK_K)[None, :]
    weights = tl.zeros([ROWS, BLOCK_K], tl.float32)
    ids = tl.zeros([ROWS, BLOCK_K], tl.int64)
    total = tl.zeros([ROWS], tl.float32)
    for column in tl.static_range(K):
        best = tl.max(keys, axis=1)
        pick = BLOCK_E - 1 - (best & (BLOCK_E - 1))
        taken = experts == pick[:, None]
        weight = tl.sum(tl.where(taken, scores, 0.0), axis=1)
        weights = tl.where(columns == column, weight[:, None], weights)
        ids = tl.where(columns == column, pick[:, None], ids)
        total += weight
        keys = tl.where(taken, _TAKEN, keys)
    if RENORMALIZES:
        weights = weights / tl.where(total > 0, total, 1.0)[:, None]
    mask = (rows < num_rows)[:, None] & (columns < K)
    where = rows[:, None] * K + columns
    tl.store(weights_ptr + where, weights, mask=mask)
    tl.store(ids_ptr + where, ids, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def grad_logits(
    logits_ptr,  # [T, E]
    slots_ptr,  # [T]
    bias_ptr,  # [S, E] f32
    weights_ptr,  # [T, K] f32
    ids_ptr,  # [T, K] int64
    grad_ptr,  # [T, K] f32, of the weights
    grad_logits_ptr,  # [T, E] as the logits
    shifted_ptr,  # [T, E] f32, the same before rounding
    num_rows,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    BIASED: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write the gradient of ROWS rows: share_j (g_j - sum_i w_i g_i).

    `g` is 0 for experts that were not chosen, and so is their share where chosen
    weights are renormalised: there w = p / sum of chosen p, and shares are w. Else
    shares are the softmax.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, BLOCK_E)[None, :]
    inside = rows < num_rows
    if RENORMALIZES:
        shares = tl.zeros([ROWS, BLOCK_E], tl.float32)
    else:
        logits = _load_logits(
            logits_ptr,
            slots_ptr,
            bias_ptr,
            rows,
            num_rows,
            E,
            BLOCK_E,
            BIASED,
            BIAS_STRIDE,
        )
        shares = _softmax(logits, EXACT)
    slopes = tl.zeros([ROWS, BLOCK_E], tl.float32)
    mean = tl.zeros([ROWS], tl.float32)
    for column in tl.static_range(K):
        where = rows * K + column
        taken = experts == tl.load(ids_ptr + where, mask=inside, other=-1)[:, None]
        slope = tl.load(grad_ptr + where, mask=inside, other=0.0)
        weight = tl.load(weights_ptr + where, mask=inside, other=0.0)
        mean += slope * weight
        slopes = tl.where(taken, slope[:, None], slopes)
        if RENORMALIZES:
            shares = tl.where(taken, weight[:, None], shares)
    slopes = shares * (slopes - mean[:, None])
    mask = inside[:, None] & (experts < E)
    where = rows[:, None] * E + experts
    rounded = slopes.to(grad_logits_ptr.dtype.element_ty)
    tl.store(grad_logits_ptr + where, rounded, mask=mask)
    tl.store(shifted_ptr + where, slopes, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def sum_slots(
    values_ptr,  # [T, E] f32
    slots_ptr,  # [T]
    sums_ptr,  # [S, E] f32
    num_rows,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCAN: tl.constexpr,
    SUMMED: tl.constexpr,
):
    """Sum the rows of one slot; reads values between its first and last row alone."""
    slot = tl.program_id(0) + 1
    first, end = num_rows, 0
    for start in range(0, num_rows, SCAN):
        rows = start + tl.arange(0, SCAN)
        mine = tl.load(slots_ptr + rows, mask=rows < num_rows, other=0) == slot
        first = tl.minimum(first, tl.min(tl.where(mine, rows, num_rows), axis=0))
        end = tl.maximum(end, tl.max(tl.where(mine, rows + 1, 0), axis=0))
    experts = tl.arange(0, BLOCK_E)
    sums = tl.zeros([SUMMED, BLOCK_E], tl.float32)
    for start in range(first, end, SUMMED):
        rows = start + tl.arange(0, SUMMED)
        mine = tl.load(slots_ptr + rows, mask=rows < end, other=0) == slot
        where = values_ptr + rows.to(tl.int64)[:, None] * E + experts[None, :]
        mask = mine[:, None] & (experts < E)[None, :]
        sums += tl.load(where, mask=mask, other=0.0)
    where = sums_ptr + (slot - 1) * E + experts
    tl.store(where, tl.sum(sums, axis=0), mask=experts < E)


@triton.jit
def _load_logits(
    logits_ptr,
    slots_ptr,
    bias_ptr,
    rows,
    num_rows,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BIASED: tl.constexpr,
    BIAS_STRIDE: tl.constexpr,
):
    """Return logits plus vector [ROWS, BLOCK_E], -infinity beyond E."""
    experts = tl.arange(0, BLOCK_E)[None, :]
    inside = rows < num_rows
    mask = inside[:, None] & (experts < E)
    where = logits_ptr + rows[:, None] * E + experts
    logits = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    if BIASED:
        slots = tl.load(slots_ptr + rows, mask=inside, other=0).to(tl.int64)[:, None]
        where = bias_ptr + (slots - 1) * BIAS_STRIDE + experts
        logits += tl.load(where, mask=mask & (slots > 0), other=0.0)
    return tl.where(experts < E, logits, -INF)


@triton.jit
def _softmax(logits, EXACT: tl.constexpr):
    powers = exp(logits - tl.max(logits, axis=1)[:, None], EXACT)
    return powers / tl.sum(powers, axis=1)[:, None]
