# SPDX-License-Identifier: Apache-2.0
"""Sum of a token's expert outputs without its unused columns, as a Triton kernel.

vLLM's `moe_sum` has such a path for expert parallelism, but reads a column only after
its id, one after the other; here all columns are on their way at once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from moe_tta.kernels.launch import Launcher, can_overlap

MANY_TOKENS = 1024  # from here on bandwidth counts, and unused columns are not read
_BLOCK = 1024


def sum_used_columns(
    expert_outputs: torch.Tensor, output: torch.Tensor, topk_ids: torch.Tensor
) -> None:
    """Add up columns of id 0 and above, in float32 and in order, as vLLM does.

    Columns of a negative id may hold anything, NaN too.

    Args:
        expert_outputs: [T, width, H], the last dimension contiguous.
        output: [T, H] of the same dtype, contiguous, overwritten.
        topk_ids: [T, width] int, contiguous.
    """
    num_tokens, width, hidden = expert_outputs.shape
    if num_tokens == 0:
        return
    kind = (
        *(hidden, width, num_tokens < MANY_TOKENS, expert_outputs.stride()),
        *(expert_outputs.device, expert_outputs.dtype, topk_ids.dtype),
    )
    _launch(
        (num_tokens, -(-hidden // _block(hidden)), 1),
        (expert_outputs, output, topk_ids),
        expert_outputs.stride()[:2],
        kind,
    )


def _block(hidden: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(hidden))


def _constants(
    hidden: int,
    width: int,
    read_all: bool,
    _strides: tuple[int, ...],
    device: torch.device,
    *_: object,
) -> dict:
    overlap = can_overlap(_sum_used_columns, device)
    return {
        "H": hidden,
        "WIDTH": width,
        "BLOCK_H": _block(hidden),
        "READ_ALL": read_all,
        "OVERLAP": overlap,
        "launch_pdl": overlap,
        "num_warps": 4,
    }


@triton.jit
def _sum_used_columns(
    expert_outputs_ptr,
    output_ptr,
    topk_ids_ptr,
    row_stride,
    column_stride,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    READ_ALL: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    if OVERLAP:
        gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = dims < H
    expert_outputs_ptr += token * row_stride + dims
    topk_ids_ptr += token * WIDTH
    total = tl.zeros([BLOCK_H], tl.float32)
    for column in tl.static_range(WIDTH):
        used = tl.where(inside, tl.load(topk_ids_ptr + column), -1) >= 0
        mask = inside
        if not READ_ALL:
            mask = used
        where = expert_outputs_ptr + column * column_stride
        part = tl.load(where, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(used, part, 0.0)
    total = total.to(output_ptr.dtype.element_ty)
    tl.store(output_ptr + token * H + dims, total, mask=inside)


_launch = Launcher(_sum_used_columns, _constants)
