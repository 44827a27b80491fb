# SPDX-License-Identifier: Apache-2.0
"""How many of a row's ranked experts it uses, and which (plain torch)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from moe_tta.kernels.noise import uniform
from moe_tta.kernels.table import LayerTable
from moe_tta.plan import Select

_TINY = torch.finfo(torch.float32).tiny


class Ranked(NamedTuple):
    """Rows with their experts in selection order."""

    order: torch.Tensor  # [T, E] int64 expert ids, best first, unselectable ones last
    eligible: torch.Tensor  # [T] int64, how many of them may be chosen
    distribution: torch.Tensor  # [T, E] f32 by expert id, sums to 1 over allowed ones


def count_experts(
    ranked: Ranked, slots: torch.Tensor, table: LayerTable, top_k: int, width: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's first rank and number of experts, by its `Select` rule.

    Source: top-p arXiv 2403.07652; relative threshold (NAEE) 2402.14800; absolute
    threshold (MoDES) 2511.15690; ranks (SCMoE) 2405.14507.

    Args:
        ranked: T ranked rows.
        slots: [T] int.
        table: The layer's plans.
        top_k: The model's own number of experts.
        width: Most experts a row can use.

    Returns:
        first rank [T] int64 (0 except for `Select.RANKS`) and count [T] int64.
    """
    select = table.select.index_select(0, slots)
    args = table.select_args.index_select(0, slots)
    k_min = table.k_min.index_select(0, slots).long()
    k_max = table.k_max.index_select(0, slots).long()
    scores = ranked.distribution.gather(1, ranked.order[:, :width])

    # `.value` throughout: Dynamo folds tensor == IntEnum member to False
    count = k_max  # TOP_K, RANKS and SAMPLE always use as many
    mass = 1 + (scores.cumsum(dim=1) <= args[:, :1]).sum(dim=1)
    count = torch.where(select == Select.TOP_P.value, mass, count)
    relative = _leading_run(scores, args[:, :1] * scores[:, :1])
    count = torch.where(select == Select.RELATIVE.value, relative, count)
    count = torch.where(
        select == Select.ABSOLUTE.value, _leading_run(scores, args[:, :1]), count
    )
    entropy = _entropy_count(ranked.distribution, args, k_min, k_max)
    count = torch.where(select == Select.ENTROPY.value, entropy, count)

    count = torch.minimum(torch.maximum(count, k_min), k_max)
    count = torch.where(select == Select.MODEL.value, top_k, count)
    last = (ranked.eligible - 1).clamp_min(0)
    first = torch.where(select == Select.RANKS.value, args[:, 0].long(), 0)
    first = torch.minimum(first, last)
    return first, torch.minimum(count, ranked.eligible - first).clamp_max(width)


def sample_order(
    ranked: Ranked,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: LayerTable,
    layer: int,
) -> torch.Tensor:
    """Return the order with `Select.SAMPLE` rows redrawn behind their kept ranks.

    Ranks below `keep` stay; ranks up to `pool` follow by falling
    `ln p / tau + Gumbel`; the others come last. Other rows keep their order.

    Source: Expert-Sample, arXiv 2602.02443.

    Args:
        ranked: T ranked rows.
        slots: [T] int.
        positions: [T] int64 absolute positions.
        table: The layer's plans.
        layer: Decoder-layer number, for the noise.

    Returns:
        [T, E] int64 expert ids.
    """
    num_experts = ranked.order.shape[1]
    args = table.select_args.index_select(0, slots)
    keep, pool, tau = args.unsqueeze(2).unbind(dim=1)  # [T, 1] each
    pool = torch.minimum(pool, ranked.eligible[:, None].float())
    noise = uniform(table.seed.index_select(0, slots), layer, positions, num_experts)
    # float64 for the reason given in `scores._activate`
    gumbel = -torch.log(-torch.log(noise.double()))
    drawn = ranked.distribution.double().log() / tau + gumbel
    drawn = drawn.float().gather(1, ranked.order)

    rank = torch.arange(num_experts, device=keep.device)
    sampled = table.select.index_select(0, slots)[:, None] == Select.SAMPLE.value
    key = torch.where(rank < pool, drawn, float("-inf"))
    key = torch.where(sampled & (rank >= keep), key, float("inf"))
    moved = key.sort(dim=1, descending=True, stable=True).indices
    return ranked.order.gather(1, moved)


def _leading_run(scores: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """Return [T]: rank 0 and the unbroken run of ranks with scores >= least."""
    return 1 + (scores[:, 1:] >= least).long().cumprod(dim=1).sum(dim=1)


def _entropy_count(
    distribution: torch.Tensor,
    args: torch.Tensor,
    k_min: torch.Tensor,
    k_max: torch.Tensor,
) -> torch.Tensor:
    """Return [T]: normalised entropy between low and high, mapped on k_min..k_max.

    Halves round to even; equal bounds make a step just above them.
    """
    num_experts = distribution.shape[1]
    entropy = torch.special.entr(distribution).sum(dim=1) / math.log(num_experts)
    low, high = args[:, 0], args[:, 1]
    share = ((entropy - low) / (high - low).clamp_min(_TINY)).clamp(0, 1)
    return k_min + torch.round((k_max - k_min) * share).long()
