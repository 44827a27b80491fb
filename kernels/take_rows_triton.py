# SPDX-License-Identifier: Apache-2.0
"""`take_rows.py` as a Triton kernel: one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_tta.kernels.launch import Launcher

_BLOCK = 2048  # elements of a program: two times 16 bytes of 16-bit floats a thread


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Take as `take_rows.take_rows`, bit for bit.

    Args:
        rows: [N, ...]; made contiguous first if its rows are in pieces.
        index: See there.
    """
    if not rows[:1].is_contiguous():
        rows = rows.contiguous()
    taken = rows.new_empty(len(index), *rows.shape[1:])
    width = rows[:1].numel()
    grid = len(index), -(-width // _BLOCK), 1
    kind = width, rows.stride(0), rows.dtype
    if taken.numel():
        _take(grid, (rows, taken, index), (), kind)
    return taken


def _constants(width: int, stride: int, _: torch.dtype) -> dict:
    block = min(_BLOCK, triton.next_power_of_2(width))
    return {"WIDTH": width, "STRIDE": stride, "BLOCK": block, "num_warps": 4}


@triton.jit
def _take_rows(
    rows_ptr,  # [N, WIDTH], STRIDE apart
    taken_ptr,  # [L, WIDTH]
    index_ptr,  # [L] int64
    WIDTH: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(index_ptr + place)
    width = tl.where(row >= 0, WIDTH, 0)
    values = tl.load(rows_ptr + row * STRIDE + dims, mask=dims < width, other=0.0)
    tl.store(taken_ptr + place * WIDTH + dims, values, mask=dims < WIDTH)


_take = Launcher(_take_rows, _constants)
