# SPDX-License-Identifier: Apache-2.0
"""Recall: the expert assignments of the reference tokens nearest to a row.

Plain torch and the reference of whatever computes it elsewhere. Nothing depends on a
value on the host, so the code can be captured in CUDA graphs. Rows never meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe_tta.kernels.table import LayerTable
from moe_tta.plan import MAX_RECALLED

GRID = 2.0**16  # cosines are multiples of 1 / GRID
PLACES = 2.0**32  # tokens of a memory, at most; cosine and place fit a float64 together
ROWS_AT_ONCE = 512  # whose products with all keys exist at the same time
_TINY = torch.finfo(torch.float64).tiny


class LayerMemory(NamedTuple):
    """One layer of a token memory; N reference tokens, H numbers a router input.

    Products are taken in the dtype of `keys`. Their last bits depend on how many rows
    stand beside a row, so that only float64's are lost in the rounding to `GRID`:
    an order of sums moves a cosine by 1e-15 or so, and one in 10^10 lies that near to
    the middle between two steps of 1.5e-5.
    """

    keys: torch.Tensor  # [N, H] router inputs of length 1
    values: torch.Tensor  # [N, E] f32 assignments, 0 but for each token's experts


class Recalled(NamedTuple):
    """What T rows recall; `mix` 0 leaves a row to its router."""

    target: torch.Tensor  # [T, E] f32, the neighbours' mean assignment
    mix: torch.Tensor  # [T] f32 in [0, 1], its share


def recall(hidden: torch.Tensor, counts: torch.Tensor, memory: LayerMemory) -> Recalled:
    """Return the mean assignment of each row's nearest tokens, and its share.

    With the cosines s_j of the row and its nearest keys, rounded to `GRID` before any
    is chosen, negative ones weighing nothing: `target = sum_j s_j v_j / sum_j s_j`;
    and `mix = mean_j s_j`, cut to 0..1. Of equal cosines the lowest places come first.

    Source: kNN-MoE, arXiv 2601.02144: similarity-weighted mean of the neighbours'
    assignments, mixed in by their mean similarity.
    Differs: the paper's measure of similarity is unconfirmed; cosine is ours.

    Args:
        hidden: [T, H] router inputs, any float dtype; a row of zeros recalls nothing,
            nor does one with NaN or infinity.
        counts: [T] int, how many neighbours each row takes, at most `MAX_RECALLED` and
            N; 0 for none.
        memory: The layer's reference tokens.
    """
    parts = zip(hidden.split(ROWS_AT_ONCE), counts.split(ROWS_AT_ONCE), strict=True)
    found = [_recall(*part, memory) for part in parts]
    return Recalled(*(torch.cat(part) for part in zip(*found, strict=True)))


def _recall(
    hidden: torch.Tensor, counts: torch.Tensor, memory: LayerMemory
) -> Recalled:
    rows = hidden.to(memory.keys.dtype)
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    cosines, places = _nearest(rows.nan_to_num(0.0), memory.keys)
    used = torch.arange(cosines.shape[1], device=hidden.device) < counts[:, None]
    similarities = torch.where(used, cosines, 0.0)
    shares = similarities.clamp_min(0)
    picked = memory.values[places].double()  # [T, width, E]
    target = torch.einsum("tj,tje->te", shares, picked)
    target = target / shares.sum(dim=1, keepdim=True).clamp_min(_TINY)
    mix = similarities.sum(dim=1) / counts.clamp_min(1)
    return Recalled(target.float(), mix.clamp(0, 1).float())


def _nearest(
    rows: torch.Tensor, keys: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines [T, width] float64 on the grid and places, nearest first."""
    # the same number of columns for all rows: sums then round alike in any company
    width = min(MAX_RECALLED, len(keys))
    steps = (rows @ keys.T).double().mul_(GRID).round_().clamp_(-GRID, GRID)
    places = torch.arange(len(keys), device=keys.device)
    # one number for both, exact: 17 bits of steps above 32 of the place
    nearest = steps.mul_(PLACES).sub_(places).topk(width, dim=1)
    return torch.ceil(nearest.values / PLACES) / GRID, nearest.indices


def recall_rows(
    hidden: torch.Tensor,
    slots: torch.Tensor,
    table: LayerTable,
    memories: Sequence[LayerMemory | None],
) -> Recalled:
    """Let every row recall from the memory that its slot's plan names.

    Args:
        hidden: [T, H] router inputs.
        slots: [T] int, each row's slot in the table.
        table: The layer's plans.
        memories: The engine's by place, from 1; `None` where one lacks this layer.
    """
    place = table.memory.index_select(0, slots)
    counts = table.neighbours.index_select(0, slots)
    target = hidden.new_zeros(len(hidden), table.bias.shape[1], dtype=torch.float32)
    mix = target.new_zeros(len(hidden))
    for number, memory in enumerate(memories, start=1):
        if memory is not None:
            here = place == number
            found = recall(hidden, torch.where(here, counts, 0), memory)
            target = torch.where(here[:, None], found.target, target)
            mix = torch.where(here, found.mix, mix)
    return Recalled(target, mix)
