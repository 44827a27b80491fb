# SPDX-License-Identifier: Apache-2.0
"""The law of routing in plain torch: what every kernel must equal, and what CPU runs.

Nothing here depends on a value on the host, so the code can be captured in CUDA
graphs and compiled. One row is one token at one MoE layer; rows never meet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_tta.kernels.recall import Recalled
from moe_tta.kernels.scores import RoutingRule, score_experts
from moe_tta.kernels.selection import Ranked, count_experts, sample_order
from moe_tta.kernels.table import DROP, Features, LayerTable
from moe_tta.plan import Renorm

_TINY = torch.finfo(torch.float32).tiny


class Routing(NamedTuple):
    """Chosen experts; unused columns repeat the row's first id with weight 0."""

    topk_weights: torch.Tensor  # [T, width] f32
    topk_ids: torch.Tensor  # [T, width] int32


def model_routing(
    router_logits: torch.Tensor, rule: RoutingRule, width: int
) -> Routing:
    """Route by the model's own rule, which is what slot 0 means.

    Args:
        router_logits: [T, E], any float dtype.
        rule: The layer's rule.
        width: Columns of the result, at least `rule.top_k`.
    """
    scores, keys = score_experts(
        router_logits.float(), None, None, None, rule, Features.NONE
    )
    order = _rank(keys)
    count = torch.full_like(order[:, 0], min(rule.top_k, width))
    return _finish(scores, order[:, :width], count, None, None, rule, Features.NONE)


def route(
    router_logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    table: LayerTable,
    rule: RoutingRule,
    width: int,
    layer: int,
    features: Features = Features.ALL,
    recalled: Recalled | None = None,
) -> Routing:
    """Route every row by its slot's plan.

    Order: forbid and bias, promote and demote, target, groups, ranking, selection,
    scale and drop, renormalisation, the model's scaling factor. Ranking goes by the
    logits where the router has no correction bias (its scores are monotone in them),
    by the blended distribution in rows with a target, their own or the plan's, and by
    biased scores otherwise; ties go to the lowest expert id.

    Source: the row operations of SteerMoE (arXiv 2509.09660), C3PO (2504.07964),
    dynamic-k rules (see `count_experts`), RICE (2505.14681) and MoTE (2502.11096).

    Args:
        router_logits: [T, >= E], any float dtype; columns beyond E are ignored.
        slots: [T] int, each row's slot in the table.
        positions: [T] int64 absolute positions, read by `Select.SAMPLE` only.
        table: The layer's plans.
        rule: The layer's own rule.
        width: Columns of the result, at least `rule.top_k`.
        layer: Decoder-layer number, read by `Select.SAMPLE` only.
        features: Parts that some slot in use needs; the others are skipped, which
            changes nothing.
        recalled: What the rows recall (`recall_rows`); `None` where the engine has no
            token memory. Softmax routers without correction bias only.
    """
    logits = router_logits[:, : table.bias.shape[1]].float()
    flags = None
    if features & (Features.MASK | Features.PROMOTE | Features.WEIGHTS):
        flags = table.flags.index_select(0, slots)
    scores, keys = score_experts(logits, flags, slots, table, rule, features, recalled)
    order, eligible = _rank(keys), _count_eligible(keys)
    if not features & Features.SELECT:
        count = eligible.clamp_max(min(rule.top_k, width))
        order = order[:, :width]
        return _finish(scores, order, count, slots, table, rule, features)
    ranked = Ranked(order, eligible, _distribution(scores, rule))
    first, count = count_experts(ranked, slots, table, rule.top_k, width)
    if features & Features.SAMPLE:
        order = sample_order(ranked, slots, positions, table, layer)
    columns = torch.arange(width, device=first.device) + first[:, None]
    order = order.gather(1, columns.clamp_max(order.shape[1] - 1))
    return _finish(scores, order, count, slots, table, rule, features)


def _rank(keys: torch.Tensor) -> torch.Tensor:
    """Return expert ids [T, E] by falling key, ties by lowest id."""
    return keys.sort(dim=1, descending=True, stable=True).indices


def _count_eligible(keys: torch.Tensor) -> torch.Tensor:
    return (keys != float("-inf")).sum(dim=1)


def _distribution(scores: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    if rule.softmax:
        return scores
    return scores / scores.sum(dim=1, keepdim=True).clamp_min(_TINY)


def _finish(
    scores: torch.Tensor,
    order: torch.Tensor,
    count: torch.Tensor,
    slots: torch.Tensor | None,
    table: LayerTable | None,
    rule: RoutingRule,
    features: Features,
) -> Routing:
    """Weigh the first `count` [T] experts of `order` [T, width]."""
    columns = torch.arange(order.shape[1], device=order.device)
    unused = columns >= count[:, None]
    ids = torch.where(unused, order[:, :1], order)
    weights = scores.gather(1, ids).masked_fill(unused, 0.0)
    if features & Features.WEIGHTS:
        rows = slots[:, None]
        weights = weights * table.scale[rows, ids]
        weights = weights.masked_fill(table.flags[rows, ids] & DROP > 0, 0.0)
        renorm = table.renorm.index_select(0, slots)[:, None]
        own = (renorm == Renorm.MODEL.value) & rule.always_renormalizes
        shares = _normalize(weights)
        weights = torch.where(own | (renorm == Renorm.ALWAYS.value), shares, weights)
    elif rule.always_renormalizes:
        weights = _normalize(weights)
    if rule.routed_scaling_factor != 1.0:
        weights = weights * rule.routed_scaling_factor
    return Routing(weights, ids.to(torch.int32))


def _normalize(weights: torch.Tensor) -> torch.Tensor:
    """Divide rows by their sum; a row without weight becomes zeros."""
    total = weights.sum(dim=1, keepdim=True)
    return torch.where(total > 0, weights / total, 0.0)
