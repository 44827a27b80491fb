# SPDX-License-Identifier: Apache-2.0
"""The heads of `rope.py` as Triton kernels: one launch forward, one backward.

Each program has one row's queries or keys (or, backward, values). Sums are those of
one program, in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_tta.kernels.launch import Launcher
from moe_tta.kernels.rope import HeadLayout, NormWeights, Tables
from moe_tta.kernels.rope_tiles import copy_part, turn_part, turn_part_back


def turn_heads(
    joint: torch.Tensor,
    tables: Tables,
    norms: NormWeights | None,
    layout: HeadLayout,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries [R, T, Q, D] and keys [R, T, K, D] of `split_heads`.

    Without norms they are turned in place and the results are views of `joint`, for
    the way back does not need it. With norms `joint` stays as it is.

    Args:
        joint: [R, T, (Q + 2 K) D], contiguous.
        tables: See `split_heads`; the same dtype.
        norms: See `split_heads`; the same dtype.
        layout: Of the rows.
    """
    query, key, _ = layout.widths
    turned = joint
    if norms is not None:
        turned = joint.new_empty(*joint.shape[:2], query + key)
    weights = norms or (joint, joint)  # not read
    _launch_turn(
        (joint.shape[0] * joint.shape[1], 2, 1),
        (joint, turned, *tables, *weights),
        (tables.cos.shape[0] * tables.cos.shape[1],),
        (layout, turned.shape[2], joint.dtype),
    )
    queries, keys = turned[:, :, : query + key].split((query, key), dim=2)
    return queries.unflatten(2, (-1, layout.dim)), keys.unflatten(2, (-1, layout.dim))


def turn_back(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    joint: torch.Tensor | None,
    tables: Tables,
    norms: NormWeights | None,
    layout: HeadLayout,
) -> torch.Tensor:
    """Return the gradient of `joint`, [R, T, (Q + 2 K) D], of `split_heads`.

    Args:
        grads: Of queries [R, T, Q, D], keys and values [R, T, K, D].
        joint: As it was before `turn_heads`; `None` where there are no norms.
        tables: As given to `turn_heads`.
        norms: As given to `turn_heads`.
        layout: Of the rows.
    """
    parts = tuple(grad.contiguous() for grad in grads)
    back = parts[0].new_empty(*parts[0].shape[:2], sum(layout.widths))
    if norms is None or joint is None:
        joint, norms = back, (back, back)  # not read
    _launch_back(
        (back.shape[0] * back.shape[1], 3, 1),
        (*parts, joint, back, *tables, *norms),
        (tables.cos.shape[0] * tables.cos.shape[1],),
        (layout, back.dtype),
    )
    return back


def _sizes(layout: HeadLayout) -> dict:
    half = triton.next_power_of_2(layout.dim // 2)
    blocks = [triton.next_power_of_2(n) for n in (layout.queries, layout.keys)]
    return {
        "QUERIES": layout.queries,
        "KEYS": layout.keys,
        "DIM": layout.dim,
        "NORMED": layout.per_head is not None,
        "PER_HEAD": bool(layout.per_head),
        "EPS": layout.eps,
        "BLOCK_QUERIES": blocks[0],
        "BLOCK_KEYS": blocks[1],
        "BLOCK_HALF": half,
        # 8 numbers of a tile for a thread: 16 bytes of bfloat16; more for wide models
        "num_warps": min(4, max(1, blocks[0] * half // 256)),
        "enable_fp_fusion": True,
    }


def _turn_constants(layout: HeadLayout, turned_width: int, *_: object) -> dict:
    return {**_sizes(layout), "TURNED_WIDTH": turned_width}


def _back_constants(layout: HeadLayout, *_: object) -> dict:
    return _sizes(layout)


@triton.jit(do_not_specialize=["positions"])
def _turn(
    joint_ptr,
    turned_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    positions,
    TURNED_WIDTH: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    NORMED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cos_ptr += row % positions * DIM
    sin_ptr += row % positions * DIM
    joint_ptr += row * (QUERIES + 2 * KEYS) * DIM
    turned_ptr += row * TURNED_WIDTH
    if tl.program_id(1) == 0:
        turn_part(
            *(joint_ptr, turned_ptr, cos_ptr, sin_ptr, query_weight_ptr),
            *(QUERIES, DIM, NORMED, PER_HEAD, EPS, BLOCK_QUERIES, BLOCK_HALF),
        )
    else:
        joint_ptr += QUERIES * DIM
        turned_ptr += QUERIES * DIM
        turn_part(
            *(joint_ptr, turned_ptr, cos_ptr, sin_ptr, key_weight_ptr),
            *(KEYS, DIM, NORMED, PER_HEAD, EPS, BLOCK_KEYS, BLOCK_HALF),
        )


@triton.jit(do_not_specialize=["positions"])
def _turn_back(
    query_grad_ptr,
    key_grad_ptr,
    value_grad_ptr,
    joint_ptr,
    back_ptr,
    cos_ptr,
    sin_ptr,
    query_weight_ptr,
    key_weight_ptr,
    positions,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DIM: tl.constexpr,
    NORMED: tl.constexpr,
    PER_HEAD: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cos_ptr += row % positions * DIM
    sin_ptr += row % positions * DIM
    joint_ptr += row * (QUERIES + 2 * KEYS) * DIM
    back_ptr += row * (QUERIES + 2 * KEYS) * DIM
    if tl.program_id(1) == 0:
        query_grad_ptr += row * QUERIES * DIM
        turn_part_back(
            *(query_grad_ptr, joint_ptr, back_ptr, cos_ptr, sin_ptr, query_weight_ptr),
            *(QUERIES, DIM, NORMED, PER_HEAD, EPS, BLOCK_QUERIES, BLOCK_HALF),
        )
    elif tl.program_id(1) == 1:
        key_grad_ptr += row * KEYS * DIM
        joint_ptr += QUERIES * DIM
        back_ptr += QUERIES * DIM
        turn_part_back(
            *(key_grad_ptr, joint_ptr, back_ptr, cos_ptr, sin_ptr, key_weight_ptr),
            *(KEYS, DIM, NORMED, PER_HEAD, EPS, BLOCK_KEYS, BLOCK_HALF),
        )
    else:
        value_grad_ptr += row * KEYS * DIM
        back_ptr += (QUERIES + KEYS) * DIM
        copy_part(value_grad_ptr, back_ptr, KEYS, DIM, BLOCK_KEYS, BLOCK_HALF)


_launch_turn = Launcher(_turn, _turn_constants)
_launch_back = Launcher(_turn_back, _back_constants)
