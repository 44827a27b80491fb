# SPDX-License-Identifier: Apache-2.0
"""Products of experts' rows with their matrices as one Triton kernel.

PyTorch's grouped products want each expert's rows copied behind one another, and on
Hopper round them up to 256; here a tile of 128 rows, or of 64 at an expert's end,
fetches them where they are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_tta.kernels.launch import Launcher
from moe_tta.kernels.pairs import PairOrder


def multiply(
    x: torch.Tensor, weight: torch.Tensor, order: PairOrder, from_rows: bool = False
) -> torch.Tensor:
    """Multiply as `pairs.multiply`, summed in float32 along the inner dimension.

    Args:
        x: [T, in] with `from_rows`, else [T K, in] by place; contiguous, T times in
            less than 2^31.
        weight: [E, in, out], contiguous or its transpose is.
        order: The places.
        from_rows: Whether pairs take their row of `x`.
    """
    num_experts, inner, outer = weight.shape
    by_output = weight.stride(1) == 1
    assert (weight.mT if by_output else weight).is_contiguous()
    product = x.new_empty(order.places.numel(), outer)
    kind = (
        *(inner, outer, num_experts, order.places.shape[1]),
        *(by_output, from_rows, x.dtype),
    )
    tile = _tile(x.dtype)
    tiles = -(-len(product) // tile["BLOCK_M"]) + num_experts
    grid = tiles * -(-outer // tile["BLOCK_N"]), 1, 1
    _multiply(grid, (x, weight, product, order.pairs, order.ends), (), kind)
    return product


def _constants(
    inner: int,
    outer: int,
    num_experts: int,
    width: int,
    by_output: bool,
    from_rows: bool,
    dtype: torch.dtype,
) -> dict:
    sizes = {"INNER": inner, "OUTER": outer, "E": num_experts, "K": width}
    sizes["E_PADDED"] = triton.next_power_of_2(num_experts)
    flags = {"BY_OUTPUT": by_output, "FROM_ROWS": from_rows}
    return {**sizes, **flags, **_tile(dtype)}


def _tile(dtype: torch.dtype) -> dict:
    if dtype.itemsize == 2:
        # 192 KiB of shared memory: in sum the fastest of 15 tried (docs/log.md)
        tile = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64}
        return {**tile, "num_warps": 8, "num_stages": 4}
    tile = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}
    return {**tile, "num_warps": 4, "num_stages": 2}


@triton.jit
def _multiply_tile(
    x_ptr,
    weight_ptr,
    product_ptr,
    pairs_ptr,
    place,  # the tile's first
    end,  # of its expert's places
    column,  # the tile's first
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    K: tl.constexpr,
    BY_OUTPUT: tl.constexpr,
    FROM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write one tile; `weight_ptr` is its expert's matrix."""
    # rows outside are read twice, not written
    inside = tl.minimum(tl.arange(0, BLOCK_M), end - 1 - place)
    if FROM_ROWS:
        rows = tl.load(pairs_ptr + place + inside) // K
    else:
        rows = inside
        x_ptr += place.to(tl.int64) * INNER
    columns = column + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    x_offsets = rows[:, None] * INNER + inner[None, :]
    if BY_OUTPUT:
        weight_offsets = inner[:, None] + columns[None, :] * INNER
        step: tl.constexpr = 1
    else:
        weight_offsets = inner[:, None] * OUTER + columns[None, :]
        step: tl.constexpr = OUTER
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first in range(0, INNER, BLOCK_K):
        x_where = x_ptr + first + x_offsets
        weight_where = weight_ptr + first * step + weight_offsets
        left = inner < INNER - first
        if INNER % BLOCK_K == 0:
            x = tl.load(x_where)
        else:
            x = tl.load(x_where, mask=left[None, :], other=0.0)
        if INNER % BLOCK_K == 0 and OUTER % BLOCK_N == 0:
            weight = tl.load(weight_where)
        else:
            used = left[:, None] & (columns < OUTER)[None, :]
            weight = tl.load(weight_where, mask=used, other=0.0)
        total = tl.dot(x, weight, total, input_precision="ieee")
    places = place + tl.arange(0, BLOCK_M)
    written = (places < end)[:, None] & (columns < OUTER)[None, :]
    where = product_ptr + places.to(tl.int64)[:, None] * OUTER + columns[None, :]
    tl.store(where, total.to(product_ptr.dtype.element_ty), mask=written)


@triton.jit
def _multiply_experts(
    x_ptr,  # [T or T K, INNER]
    weight_ptr,  # [E, INNER, OUTER], or [E, OUTER, INNER] if BY_OUTPUT
    product_ptr,  # [T K, OUTER]
    pairs_ptr,  # [T K] int32
    ends_ptr,  # [E] int32
    INNER: tl.constexpr,
    OUTER: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    E_PADDED: tl.constexpr,
    BY_OUTPUT: tl.constexpr,
    FROM_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # tiles of the same rows run together, then those of the same expert
    across: tl.constexpr = (OUTER + BLOCK_N - 1) // BLOCK_N
    tile = tl.program_id(0) // across
    column = tl.program_id(0) % across * BLOCK_N
    experts = tl.arange(0, E_PADDED)
    known = experts < E
    ends = tl.load(ends_ptr + experts, mask=known, other=0)
    begins = tl.load(ends_ptr + experts - 1, mask=known & (experts > 0), other=0)
    tiles = tl.where(known, tl.cdiv(ends - begins, BLOCK_M), 0)
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    if expert >= E:
        return
    before = tl.sum(tl.where(experts < expert, tiles, 0), 0)
    begin = tl.sum(tl.where(experts == expert, begins, 0), 0)
    end = tl.sum(tl.where(experts == expert, ends, 0), 0)
    place = begin + (tile - before) * BLOCK_M
    weight_ptr += expert.to(tl.int64) * (INNER * OUTER)
    # fmt: off
    if end - place <= BLOCK_M // 2:
        _multiply_tile(
            x_ptr, weight_ptr, product_ptr, pairs_ptr, place, end, column,
            INNER, OUTER, K, BY_OUTPUT, FROM_ROWS, BLOCK_M // 2, BLOCK_N, BLOCK_K,
        )
    else:
        _multiply_tile(
            x_ptr, weight_ptr, product_ptr, pairs_ptr, place, end, column,
            INNER, OUTER, K, BY_OUTPUT, FROM_ROWS, BLOCK_M, BLOCK_N, BLOCK_K,
        )
    # fmt: on


_multiply = Launcher(_multiply_experts, _constants)
