# SPDX-License-Identifier: Apache-2.0
"""The routing kernel: rows that are padding, planned or the model's own."""

from __future__ import annotations

from enum import Enum

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from moe_tta.kernels.route_model import route_model_row
from moe_tta.kernels.route_nets import load_runs, route_model_runs
from moe_tta.kernels.route_plan import fill_unused, route_planned_row
from moe_tta.kernels.route_tile import route_model_tile


class ModelRows(Enum):
    """What rows of slot 0 get."""

    LAW = 0  # the law with a neutral plan: any router
    STOCK = 1  # the bits of vLLM's `topk_softmax`: routers without groups and biases
    GIVEN = 2  # the routing that the caller passes: routers that bring their own code


_LAW, _STOCK, _ = (tl.constexpr(rows.value) for rows in ModelRows)


@triton.jit(do_not_specialize=["layer", "num_rows", "top_k"])
def route_rows(
    weights_ptr,  # [T, WIDTH] f32
    ids_ptr,  # [T, WIDTH] int32
    logits_ptr,  # [T, >= E]
    slots_ptr,  # [T]
    positions_ptr,  # [T] int64
    padding_ptr,  # [T] bool, read with HAS_PADDING
    given_weights_ptr,  # [T, TOP_K] f32, read with GIVEN
    given_ids_ptr,  # [T, TOP_K] int
    plans_ptr,  # [S, bytes], `LayerTable.packed`
    correction_ptr,  # [E], read with BIASED
    recalled_target_ptr,  # [T, E] f32, read with RECALLS
    recalled_mix_ptr,  # [T] f32, read with RECALLS
    logits_row_stride,
    logits_column_stride,
    plans_stride,
    layer,
    num_rows,  # T
    top_k,  # TOP_K again, so that a loop over it is not unrolled: code costs time
    ROWS: tl.constexpr,
    LANES: tl.constexpr,  # of a row, with networks; 0 without
    HAS_PADDING: tl.constexpr,
    RECALLS: tl.constexpr,
    SKIP_UNUSED: tl.constexpr,
    RUN: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
    IN_WARP: tl.constexpr,
    EXACT: tl.constexpr,
    E: tl.constexpr,
    LOG_E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    FACTOR: tl.constexpr,
    MODEL_ROWS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Route `ROWS` rows of T: at once where all are the model's, else one by one.

    More than one: 16-bit logits of `ModelRows.STOCK`, and rows that fit a warp.
    """
    if OVERLAP:
        gdc_wait()  # above: the launch itself, while the one before it still runs
    first = tl.program_id(0).to(tl.int64) * ROWS
    one_by_one = True
    if ROWS > 1:
        rows = first + tl.arange(0, ROWS)
        live = rows < num_rows
        tile_ptr = logits_ptr + first * logits_row_stride
        if LANES > 0:  # before the slots are known: one wait for both
            runs = load_runs(tile_ptr, logits_row_stride, live, ROWS, LANES, E)
        slots = tl.load(slots_ptr + rows, mask=live, other=0)
        one_by_one = tl.max(slots, axis=0) > 0
        if HAS_PADDING:
            padding = tl.load(padding_ptr + rows, mask=live, other=0).to(tl.int32)
            one_by_one = one_by_one | (tl.max(padding, axis=0) > 0)
        if not one_by_one:
            if LANES > 0:
                sure = route_model_runs(
                    *(weights_ptr + first * WIDTH, ids_ptr + first * WIDTH),
                    *(runs, tile_ptr, logits_row_stride),
                    *(live, ROWS, LANES, E, WIDTH, TOP_K, RENORMALIZES, SKIP_UNUSED),
                    EXACT,
                )
            else:
                sure = route_model_tile(
                    *(weights_ptr + first * WIDTH, ids_ptr + first * WIDTH),
                    *(tile_ptr, logits_row_stride),
                    *(logits_column_stride, live, top_k, ROWS),
                    *(E, BLOCK_E, WIDTH, BLOCK_W, RENORMALIZES, SKIP_UNUSED),
                    *(RUN, THREADS, LOADS, EXACT),
                )
            one_by_one = sure == 0
    if ROWS == 1:
        _route_row(
            first,
            *(weights_ptr, ids_ptr, logits_ptr, logits_row_stride),
            *(logits_column_stride, slots_ptr, positions_ptr, padding_ptr),
            *(given_weights_ptr, given_ids_ptr, plans_ptr, plans_stride),
            *(correction_ptr, recalled_target_ptr, recalled_mix_ptr, layer, top_k),
            *(HAS_PADDING, RECALLS, RUN, THREADS, LOADS, IN_WARP, EXACT),
            *(E, LOG_E, BLOCK_E, WIDTH, BLOCK_W, TOP_K, SCORING, BIASED),
            *(RENORMALIZES, GROUPS, TOPK_GROUP, FACTOR, MODEL_ROWS),
            SKIP_UNUSED,
        )
    elif one_by_one:
        for row in range(first, tl.minimum(first + ROWS, num_rows)):
            _route_row(
                row,
                *(weights_ptr, ids_ptr, logits_ptr, logits_row_stride),
                *(logits_column_stride, slots_ptr, positions_ptr, padding_ptr),
                *(given_weights_ptr, given_ids_ptr, plans_ptr, plans_stride),
                *(correction_ptr, recalled_target_ptr, recalled_mix_ptr, layer, top_k),
                *(HAS_PADDING, RECALLS, RUN, THREADS, LOADS, IN_WARP, EXACT),
                *(E, LOG_E, BLOCK_E, WIDTH, BLOCK_W, TOP_K, SCORING, BIASED),
                *(RENORMALIZES, GROUPS, TOPK_GROUP, FACTOR, MODEL_ROWS),
                SKIP_UNUSED,
            )


@triton.jit
def _route_row(
    row,
    weights_ptr,
    ids_ptr,
    logits_ptr,
    row_stride,
    column_stride,
    slots_ptr,
    positions_ptr,
    padding_ptr,
    given_weights_ptr,
    given_ids_ptr,
    plans_ptr,
    plans_stride,
    correction_ptr,
    recalled_target_ptr,
    recalled_mix_ptr,
    layer,
    top_k,
    HAS_PADDING: tl.constexpr,
    RECALLS: tl.constexpr,
    RUN: tl.constexpr,
    THREADS: tl.constexpr,
    LOADS: tl.constexpr,
    IN_WARP: tl.constexpr,
    EXACT: tl.constexpr,
    E: tl.constexpr,
    LOG_E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    FACTOR: tl.constexpr,
    MODEL_ROWS: tl.constexpr,
    SKIP_UNUSED: tl.constexpr,
):
    """Route one row: padding, by its plan, or by the model's own rule."""
    weights_ptr += row * WIDTH
    ids_ptr += row * WIDTH
    logits_ptr += row * row_stride
    slot = tl.load(slots_ptr + row).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    columns = experts.to(tl.int64) * column_stride
    logits = tl.load(logits_ptr + columns, mask=experts < E, other=0.0).to(tl.float32)
    is_padding = False
    if HAS_PADDING:
        is_padding = tl.load(padding_ptr + row) != 0
    by_plan = slot > 0
    if MODEL_ROWS == _LAW:
        by_plan = True
    if is_padding:
        fill_unused(weights_ptr, ids_ptr, 0, 0, WIDTH, BLOCK_W, True)
    elif by_plan:
        route_planned_row(
            *(weights_ptr, ids_ptr, logits, slot > 0, positions_ptr + row),
            *(plans_ptr + slot * plans_stride, correction_ptr),
            *(recalled_target_ptr + row * E, recalled_mix_ptr + row, layer, RECALLS),
            *(E, LOG_E, BLOCK_E, WIDTH, BLOCK_W, TOP_K, SCORING, BIASED),
            *(RENORMALIZES, GROUPS, TOPK_GROUP, FACTOR, SKIP_UNUSED),
        )
    elif MODEL_ROWS == _STOCK:
        route_model_row(
            *(weights_ptr, ids_ptr, logits, logits_ptr, column_stride, top_k),
            *(E, BLOCK_E, WIDTH, BLOCK_W, RENORMALIZES, SKIP_UNUSED),
            *(RUN, THREADS, LOADS, IN_WARP, EXACT),
        )
    else:
        best = _copy_row(
            *(weights_ptr, ids_ptr, given_weights_ptr + row * TOP_K),
            *(given_ids_ptr + row * TOP_K, BLOCK_W, TOP_K),
        )
        if WIDTH > TOP_K:
            fill_unused(weights_ptr, ids_ptr, TOP_K, best, WIDTH, BLOCK_W, SKIP_UNUSED)


@triton.jit
def _copy_row(
    weights_ptr,
    ids_ptr,
    given_weights_ptr,
    given_ids_ptr,
    BLOCK_W: tl.constexpr,
    TOP_K: tl.constexpr,
):
    """Copy a given row's columns and return its first id."""
    tail = tl.arange(0, BLOCK_W)
    columns = tail < TOP_K
    weights = tl.load(given_weights_ptr + tail, mask=columns, other=0.0)
    ids = tl.load(given_ids_ptr + tail, mask=columns, other=0).to(tl.int32)
    tl.store(weights_ptr + tail, weights.to(tl.float32), mask=columns)
    tl.store(ids_ptr + tail, ids, mask=columns)
    return tl.sum(tl.where(tail == 0, ids, 0), axis=0)
