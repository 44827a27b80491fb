# SPDX-License-Identifier: Apache-2.0
"""`pairs.order_pairs` as two Triton kernels: count experts in blocks, then place.

A counting sort, since a radix sort of torch's takes many launches and ids are few.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_tta.kernels.launch import Launcher
from moe_tta.kernels.pairs import PairOrder

_BLOCK = 128  # pairs of a program: every thread holds 32 numbers of [128, E] at E = 64
_CHUNK = 64  # blocks whose counts are read at once


def order_pairs(ids: torch.Tensor, num_experts: int) -> PairOrder:
    """Sort pairs as `pairs.order_pairs`; `ids` [T, K] contiguous, T at least 1."""
    num_pairs, device = ids.numel(), ids.device
    num_blocks = -(-num_pairs // _BLOCK)
    counts = torch.empty((num_blocks, num_experts), dtype=torch.int32, device=device)
    places = torch.empty(ids.shape, dtype=torch.int32, device=device)
    pairs = torch.empty(num_pairs, dtype=torch.int32, device=device)
    ends = torch.empty(num_experts, dtype=torch.int32, device=device)
    grid, kind = (num_blocks, 1, 1), (num_experts, ids.dtype)
    _count(grid, (ids, counts), (num_pairs,), kind)
    tensors = ids, counts, places, pairs, ends
    _place(grid, tensors, (num_pairs, num_blocks), kind)
    return PairOrder(places, pairs, ends)


def _constants(num_experts: int, *_: object) -> dict:
    return {
        "E": num_experts,
        "BLOCK_E": triton.next_power_of_2(num_experts),
        "BLOCK_P": _BLOCK,
        "num_warps": 8,
    }


def _place_constants(num_experts: int, *_: object) -> dict:
    return {**_constants(num_experts), "CHUNK": _CHUNK}


@triton.jit(do_not_specialize=["num_pairs"])
def _count_experts(
    ids_ptr,  # [T K]
    counts_ptr,  # [blocks, E] int32
    num_pairs,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    block = tl.program_id(0)
    pairs = block * BLOCK_P + tl.arange(0, BLOCK_P)
    experts = tl.arange(0, BLOCK_E)
    ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1).to(tl.int32)
    counts = tl.sum((ids[:, None] == experts[None, :]).to(tl.int32), axis=0)
    tl.store(counts_ptr + block * E + experts, counts, mask=experts < E)


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _place_pairs(
    ids_ptr,  # [T K]
    counts_ptr,  # [blocks, E] int32
    places_ptr,  # [T K] int32
    pairs_ptr,  # [T K] int32
    ends_ptr,  # [E] int32
    num_pairs,
    num_blocks,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    every = tl.zeros([BLOCK_E], tl.int32)
    before = tl.zeros([BLOCK_E], tl.int32)
    for first in range(0, num_blocks, CHUNK):
        blocks = first + tl.arange(0, CHUNK)
        mask = (blocks < num_blocks)[:, None] & (experts < E)[None, :]
        where = counts_ptr + blocks[:, None] * E + experts[None, :]
        counts = tl.load(where, mask=mask, other=0)
        every += tl.sum(counts, axis=0)
        before += tl.sum(tl.where((blocks < block)[:, None], counts, 0), axis=0)
    ends = tl.cumsum(every, axis=0)
    # all programs write the same
    tl.store(ends_ptr + experts, ends, mask=experts < E)

    pairs = block * BLOCK_P + tl.arange(0, BLOCK_P)
    inside = pairs < num_pairs
    ids = tl.load(ids_ptr + pairs, mask=inside, other=-1).to(tl.int32)
    mine = (ids[:, None] == experts[None, :]).to(tl.int32)
    starts = ends - every + before - 1
    places = tl.sum(mine * (tl.cumsum(mine, axis=0) + starts[None, :]), axis=1)
    tl.store(places_ptr + pairs, places, mask=inside)
    tl.store(pairs_ptr + places, pairs, mask=inside)


_count = Launcher(_count_experts, _constants)
_place = Launcher(_place_pairs, _place_constants)
