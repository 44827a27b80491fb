# SPDX-License-Identifier: Apache-2.0
"""Many rows of 16-bit logits by the model's own rule: the eight best by networks.

As in `route_tile.py` one integer holds an expert's logit and number, and rows whose
order by these integers may not be that of stock vLLM's softmax are left to the caller.
Here a few lanes share a row: each sorts runs of eight integers and merges them without
a branch, so that a row costs a third of the instructions.
"""
# ruff: noqa: RUF005 -- Triton's compiler takes no starred tuples

from __future__ import annotations

import triton
import triton.language as tl

from moe_tta.kernels.networks import merge8, sort8
from moe_tta.kernels.route_model import exp, reciprocal
from moe_tta.kernels.route_ranks import INF

RUN = 8  # experts that `SumOrder` sums one after the other; most of `top_k` and WIDTH
_NUMBER = tl.constexpr(0x1FFF)  # low bits, 0 in every 16-bit float as a float32
_LOGIT = tl.constexpr(-0x2000)  # the others
_MAGNITUDE = tl.constexpr(0x7FFFE000)  # of these, all but the sign
_LOWEST = tl.constexpr(-(2**31))  # below every key
# see `route_tile._APART` and `_NORMAL`
_APART = tl.constexpr(2.0**-15)
_NORMAL = tl.constexpr(80.0)


@triton.jit
def route_model_runs(
    weights_ptr,  # [ROWS, WIDTH] f32
    ids_ptr,  # [ROWS, WIDTH] int32
    runs,  # what `load_runs` returned
    logits_ptr,  # [ROWS, >= E] bf16 or f16, columns side by side
    row_stride,
    live,  # [ROWS], rows that exist
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    E: tl.constexpr,  # RUN * LANES * 2^n, at most 256
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    SKIP_UNUSED: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write all columns of neighbouring rows; return whether all of them are sure.

    If not, nothing is written.
    """
    PARTS: tl.constexpr = E // (8 * LANES)
    keys = _sorted_keys(runs[0], 0, LANES)
    for part in tl.static_range(1, PARTS):
        keys = merge8(*keys, *_sorted_keys(runs[part], part, LANES))
    keys = tl.reduce(keys, 1, merge8)
    best = _logit(keys[0])
    total = _sum_powers(runs, best[:, None], ROWS, LANES, PARTS, EXACT)
    scale = reciprocal(total, EXACT)

    shares, chosen = (), tl.zeros([ROWS], tl.float32)
    for rank in tl.static_range(8):
        share = exp(_logit(keys[rank]) - best, EXACT) * scale
        if rank < TOP_K:
            chosen += share
        shares = shares + (share,)
    tail = tl.arange(0, 8)[None, :]
    weights = tl.where(tail < TOP_K, _columns(*shares, ROWS), 0.0)
    if RENORMALIZES:
        weights *= reciprocal(chosen, EXACT)[:, None]
    ids = _number(_columns(*keys, ROWS))
    if TOP_K < WIDTH:
        first = -1
        if not SKIP_UNUSED:
            first = _number(keys[0])[:, None]
        ids = tl.where(tail < TOP_K, ids, first)

    # no infinity, no NaN, normal numbers
    sure = (total < INF) & (best - _logit(keys[7]) <= _NORMAL)
    risky = _may_tie(keys, logits_ptr.dtype.element_ty)
    cells = tl.arange(0, ROWS)[:, None] * WIDTH + tail
    mask = live[:, None] & (tail < WIDTH)
    all_sure = _all((sure & (risky == 0)) | (live == 0))
    if all_sure:
        tl.store(weights_ptr + cells, weights, mask=mask)
        tl.store(ids_ptr + cells, ids, mask=mask)
    elif _all(sure | (live == 0)):  # last: a branch before costs 10 % of the time
        apart = _are_apart(keys, logits_ptr, row_stride, live, ROWS, LANES, E)
        all_sure = _all(apart | (live == 0))
        if all_sure:
            tl.store(weights_ptr + cells, weights, mask=mask)
            tl.store(ids_ptr + cells, ids, mask=mask)
    return all_sure


@triton.jit
def _all(bits):
    return tl.min(bits.to(tl.int32), axis=0) > 0


@triton.jit
def load_runs(
    logits_ptr,
    row_stride,
    live,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    E: tl.constexpr,
):
    """Load the logits of neighbouring rows; for each part of E, each lane's run."""
    runs = ()
    for part in tl.static_range(E // (8 * LANES)):
        runs = runs + (_load_run(logits_ptr, row_stride, live, part, ROWS, LANES),)
    return runs


@triton.jit
def _load_part(
    logits_ptr, row_stride, live, part, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Load [ROWS, LANES * 8] neighbouring logits."""
    rows = tl.arange(0, ROWS)[:, None].to(tl.int64)
    columns = part * (LANES * 8) + tl.arange(0, LANES * 8)[None, :]
    where = logits_ptr + rows * row_stride + columns
    return tl.load(where, mask=live[:, None], other=0.0)


@triton.jit
def _load_run(
    logits_ptr, row_stride, live, part, ROWS: tl.constexpr, LANES: tl.constexpr
):
    """Load each lane's run: eight [ROWS, LANES]."""
    logits = _load_part(logits_ptr, row_stride, live, part, ROWS, LANES)
    even, odd = tl.split(tl.reshape(logits, [ROWS, LANES, 4, 2]))
    a, c = tl.split(tl.reshape(even, [ROWS, LANES, 2, 2]))
    b, d = tl.split(tl.reshape(odd, [ROWS, LANES, 2, 2]))
    x0, x4 = tl.split(a)
    x1, x5 = tl.split(b)
    x2, x6 = tl.split(c)
    x3, x7 = tl.split(d)
    return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _columns(a, b, c, d, e, f, g, h, ROWS: tl.constexpr):
    """Put eight [ROWS] side by side."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.reshape(tl.join(even, odd), [ROWS, 8])


@triton.jit
def _sorted_keys(run, part, LANES: tl.constexpr):
    first = (part * LANES + tl.arange(0, LANES)[None, :]) * 8
    keys = ()
    for step in tl.static_range(8):
        keys = keys + (_turn(_bits(run[step])) | (_NUMBER - step - first),)
    return sort8(*keys)


@triton.jit
def _sum_powers(
    runs,
    best,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    PARTS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Sum exp(logits - best) [ROWS] in the order of `SumOrder`: halves meet."""
    sums = ()
    for part in tl.static_range(PARTS):
        total = exp(runs[part][0].to(tl.float32) - best, EXACT)
        for step in tl.static_range(1, 8):
            total += exp(runs[part][step].to(tl.float32) - best, EXACT)
        sums = sums + (total,)
    for level in tl.static_range(1, 6):
        if PARTS >> level > 0:
            met = ()
            for part in tl.static_range(PARTS >> level):
                met = met + (sums[part] + sums[part + (PARTS >> level)],)
            sums = met
    total = sums[0]
    for level in tl.static_range(1, 6):
        if LANES >> level > 0:
            total = tl.sum(tl.reshape(total, [ROWS, 2, LANES >> level]), axis=1)
    return tl.sum(total, axis=1)


@triton.jit
def _may_tie(keys, dtype: tl.constexpr):
    """Return where a chosen logit is so near 0 that others may be closer than _APART.

    Beyond that, neighbouring numbers of the type are `_APART` or more apart.
    """
    NEAR: tl.constexpr = 2.0**-7 if dtype == tl.bfloat16 else 2.0**-4
    found = tl.abs(_logit(keys[0])) < NEAR
    for rank in tl.static_range(1, 8):
        found = found | (tl.abs(_logit(keys[rank])) < NEAR)
    return found


@triton.jit
def _are_apart(
    keys, logits_ptr, row_stride, live, ROWS: tl.constexpr, LANES: tl.constexpr, E
):
    """Return where the eight and what is below them are equal or `_APART`."""
    sure = live
    for rank in tl.static_range(7):
        sure = sure & _equal_or_apart(keys[rank], keys[rank + 1])
    # of the experts left out, equals of the last one have higher numbers
    edge = keys[7] & _LOGIT
    below = tl.full([ROWS], _LOWEST, tl.int32)
    for part in range(E // (8 * LANES)):
        more = _turn(_bits(_load_part(logits_ptr, row_stride, live, part, ROWS, LANES)))
        more = tl.where(more < edge[:, None], more, _LOWEST)
        below = tl.maximum(below, tl.max(more, axis=1))
    return sure & ((below == _LOWEST) | _equal_or_apart(edge, below))


@triton.jit
def _equal_or_apart(above, below):
    equal = (above ^ below) & _LOGIT == 0
    return equal | (_logit(above) - _logit(below) >= _APART)


@triton.jit
def _bits(logits):
    return logits.to(tl.float32).to(tl.int32, bitcast=True)


@triton.jit
def _turn(bits):
    """Map a float32's bits to an integer of the same order, or back."""
    return bits ^ ((bits >> 31) & _MAGNITUDE)


@triton.jit
def _logit(keys):
    return _turn(keys & _LOGIT).to(tl.float32, bitcast=True)


@triton.jit
def _number(keys):
    return _NUMBER - (keys & _NUMBER)
