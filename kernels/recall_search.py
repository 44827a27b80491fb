# SPDX-License-Identifier: Apache-2.0
"""Which tokens are nearest to each row that asks: parts of the memory, one by one."""

from __future__ import annotations

import triton
import triton.language as tl

from moe_tta.kernels.recall import GRID
from moe_tta.kernels.recall_lists import (
    blocks_of_a_part,
    empty_lists,
    insert,
    join,
    num_lists,
)
from moe_tta.kernels.table import Layout

_GRID = tl.constexpr(GRID)
# adding and taking away rounds a float64 to an integer, half to even as torch.round
_TO_INTEGER = tl.constexpr(1.5 * 2**52)
_OFFSETS = Layout.of(1).offsets
_MEMORY, _NEIGHBOURS = (tl.constexpr(_OFFSETS[n]) for n in ("memory", "neighbours"))


@triton.jit(do_not_specialize=["num_rows"])
def search_tokens(
    hidden_ptr,  # [T, H]
    asking_ptr,  # [1 + T] int32, a count and rows
    slots_ptr,  # [T] int32
    plans_ptr,  # [S, bytes], `LayerTable.packed`
    keys_ptr,  # [N, H] f32
    inverse_lengths_ptr,  # [N] f64
    starts_ptr,  # [PLACES + 1] int64
    lists_ptr,  # [CAPACITY, WIDTH] int64
    hidden_stride,
    plans_stride,  # in int32
    num_rows,  # T
    PLACES: tl.constexpr,
    H: tl.constexpr,
    CAPACITY: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """List each row's nearest tokens of each part of its memory."""
    count = tl.load(asking_ptr)
    tiles = tl.cdiv(count, ROWS)
    splits = num_lists(tiles, CAPACITY, MAX_SPLITS, ROWS)
    for item in range(tl.program_id(0), tiles * splits * PLACES, tl.num_programs(0)):
        # programs side by side take the rows' tiles of the same keys
        place = item // tiles % PLACES
        split = item // tiles // PLACES
        start, end = tl.load(starts_ptr + place), tl.load(starts_ptr + place + 1)
        each = blocks_of_a_part(end - start, splits, BLOCK_N) * BLOCK_N
        first = start + split * each
        end = tl.minimum(first + each, end)
        index = item % tiles * ROWS + tl.arange(0, ROWS)
        rows, memory, wanted = plans_of(
            index, count, asking_ptr, slots_ptr, plans_ptr, plans_stride, num_rows
        )
        wanted = tl.where(memory == place + 1, wanted, 0)
        if (first < end) & (tl.max(wanted, axis=0) > 0):
            best = _nearest(
                *(hidden_ptr + rows * hidden_stride, wanted, keys_ptr),
                *(inverse_lengths_ptr, first, end),
                *(H, ROWS, BLOCK_N, BLOCK_H, WIDTH),
            )
            columns = tl.arange(0, WIDTH)[None, :]
            lists = (index * splits + split)[:, None] * WIDTH
            tl.store(lists_ptr + lists + columns, best, mask=columns < wanted[:, None])


@triton.jit
def plans_of(index, count, asking_ptr, slots_ptr, plans_ptr, plans_stride, num_rows):
    """Return rows, and the memory and number of neighbours that their plans name."""
    live = index < count
    rows = tl.load(asking_ptr + 1 + index, mask=live, other=0).to(tl.int64)
    live = live & (rows < num_rows)
    slots = tl.load(slots_ptr + rows, mask=live, other=0).to(tl.int64)
    plans = plans_ptr.to(tl.pointer_type(tl.int32)) + slots * plans_stride
    memory = tl.load(plans + _MEMORY // 4, mask=live, other=0)
    wanted = tl.load(plans + _NEIGHBOURS // 4, mask=live & (memory > 0), other=0)
    return rows, memory, wanted


@triton.jit
def _nearest(
    rows_ptr,  # [ROWS]
    wanted,  # [ROWS] int32
    keys_ptr,
    inverse_lengths_ptr,
    first,
    end,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the tokens of `first` to `end` nearest to each row [ROWS, WIDTH]."""
    dims = tl.arange(0, BLOCK_H)[None, :]
    asks = (wanted > 0)[:, None]
    squares = tl.zeros([ROWS], tl.float64)
    for at in range(0, H, BLOCK_H):
        mask = asks & (at + dims < H)
        hidden = tl.load(rows_ptr[:, None] + at + dims, mask=mask, other=0.0)
        hidden = hidden.to(tl.float64)
        squares += tl.sum(hidden * hidden, axis=1)
    # false for NaN too: such rows are as far from every token
    known = (squares > 0) & (squares < float("inf"))
    inverse = 1.0 / tl.sqrt(tl.where(known, squares, 1.0))

    columns = tl.arange(0, WIDTH)[None, :]
    best = empty_lists(wanted[:, None], columns)
    for block in range(first, end, BLOCK_N):
        tokens = block + tl.arange(0, BLOCK_N)
        inside = tokens < end
        products = tl.zeros([ROWS, BLOCK_N], tl.float64)
        for at in range(0, H, BLOCK_H):
            within = at + dims < H
            hidden = tl.load(
                rows_ptr[:, None] + at + dims, mask=asks & within, other=0.0
            )
            keys = tl.load(
                keys_ptr + tokens[:, None] * H + at + dims,
                mask=inside[:, None] & within,
                other=0.0,
            )
            products = tl.dot(
                _widen(hidden, ROWS, BLOCK_H),
                tl.trans(keys.to(tl.float64)),
                products,
                out_dtype=tl.float64,
            )
        scale = tl.load(inverse_lengths_ptr + tokens, mask=inside, other=0.0)
        cosines = products * inverse[:, None] * scale[None, :]
        cosines = tl.where(known[:, None], cosines, 0.0)
        steps = cosines * _GRID + _TO_INTEGER - _TO_INTEGER
        steps = tl.minimum(tl.maximum(steps, -_GRID), _GRID).to(tl.int64)
        best = insert(best, join(steps, tokens[None, :], inside[None, :]))
    return best


@triton.jit
def _widen(values, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return values [ROWS, COLUMNS] as float64 for a product.

    The sum over one number hides the 16 bits that they come from: Triton 3.7 lays the
    product out for these and then fails to compile it.
    """
    wide = tl.reshape(values.to(tl.float32), [ROWS, COLUMNS, 1])
    return tl.sum(wide, axis=2).to(tl.float64)
