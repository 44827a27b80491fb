# SPDX-License-Identifier: Apache-2.0
"""The mean assignment of each row's nearest tokens, and its share."""

from __future__ import annotations

import triton
import triton.language as tl

from moe_tta.kernels.recall import GRID
from moe_tta.kernels.recall_lists import (
    NO_TOKEN,
    blocks_of_a_part,
    empty_lists,
    insert,
    num_lists,
    places_of,
    steps_of,
)
from moe_tta.kernels.recall_search import plans_of

_GRID = tl.constexpr(GRID)


@triton.jit(do_not_specialize=["num_rows"])
def mean_tokens(
    asking_ptr,  # [1 + T] int32, a count and rows
    slots_ptr,  # [T] int32
    plans_ptr,  # [S, bytes], `LayerTable.packed`
    values_ptr,  # [N, E] f32
    starts_ptr,  # [P + 1] int64
    lists_ptr,  # [CAPACITY, WIDTH] int64
    target_ptr,  # [T, E] f32
    mix_ptr,  # [T] f32
    plans_stride,  # in int32
    num_rows,  # T
    E: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write the mean assignment of each row's nearest tokens, and its share."""
    count = tl.load(asking_ptr)
    splits = num_lists(tl.cdiv(count, ROWS), CAPACITY, MAX_SPLITS, ROWS)
    for index in range(tl.program_id(0), count, tl.num_programs(0)):
        row, memory, wanted = plans_of(
            index, count, asking_ptr, slots_ptr, plans_ptr, plans_stride, num_rows
        )
        if memory > 0:
            start = tl.load(starts_ptr + memory - 1)
            num_tokens = tl.load(starts_ptr + memory) - start
            each = tl.maximum(blocks_of_a_part(num_tokens, splits, BLOCK_N), 1)
            parts = tl.cdiv(tl.cdiv(num_tokens, BLOCK_N), each)
            best = _best_of_lists(
                lists_ptr + index * splits * WIDTH,
                *(parts * wanted, wanted, BLOCK_C, WIDTH),
            )
            _write_mean(
                *(best, wanted, values_ptr, target_ptr + row * E, mix_ptr + row),
                *(E, BLOCK_E),
            )


@triton.jit
def _best_of_lists(
    lists_ptr,  # [parts, WIDTH], the first `wanted` columns filled
    num_entries,
    wanted,
    BLOCK_C: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the nearest tokens of all parts, [1, WIDTH]."""
    best = empty_lists(wanted, tl.arange(0, WIDTH)[None, :])
    for at in range(0, num_entries, BLOCK_C):
        entries = at + tl.arange(0, BLOCK_C)[None, :]
        where = entries // wanted * WIDTH + entries % wanted
        inside = entries < num_entries
        found = tl.load(lists_ptr + where, mask=inside, other=0)
        # below the entries that hold no token yet
        found = tl.where(inside & (found >= 0), found, NO_TOKEN)
        best = insert(best, found)
    return best


@triton.jit
def _write_mean(
    best,  # [1, WIDTH]
    wanted,
    values_ptr,  # [N, E] f32
    target_ptr,  # [E] f32
    mix_ptr,  # f32
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Write target and mix of one row, summed in float64."""
    best = tl.reshape(best, [best.shape[1], 1])
    filled = (best >= 0) & (tl.arange(0, best.shape[0])[:, None] < wanted)
    cosines = tl.where(filled, steps_of(best).to(tl.float64) / _GRID, 0.0)
    shares = tl.maximum(cosines, 0.0)
    total = tl.sum(tl.sum(shares, axis=1), axis=0)
    total = tl.where(total > 0, total, 1.0)
    mix = tl.sum(tl.sum(cosines, axis=1), axis=0) / wanted.to(tl.float64)
    tl.store(mix_ptr, tl.minimum(tl.maximum(mix, 0.0), 1.0).to(tl.float32))
    places = tl.where(filled, places_of(best), 0)
    for at in range(0, E, BLOCK_E):
        experts = at + tl.arange(0, BLOCK_E)[None, :]
        values = tl.load(
            values_ptr + places * E + experts,
            mask=filled & (experts < E),
            other=0.0,
        )
        target = tl.sum(shares * values.to(tl.float64), axis=0) / total
        experts = at + tl.arange(0, BLOCK_E)
        tl.store(target_ptr + experts, target.to(tl.float32), mask=experts < E)
