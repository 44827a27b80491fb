# SPDX-License-Identifier: Apache-2.0
"""Scores of all experts, and the keys by which a router ranks them (plain torch)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_tta.kernels.recall import Recalled
from moe_tta.kernels.table import DEMOTE, FORBIDDEN, PROMOTE, Features, LayerTable
from moe_tta.shape import RouterShape, Scoring

EPS = 0.01  # distance of promoted and demoted experts from the row's best and worst


@dataclass(frozen=True, eq=False)
class RoutingRule:
    """One layer's own routing rule, as vLLM's routers name its parts.

    `correction_bias` [E] steers selection only: weights stay the unbiased scores.
    """

    scoring: Scoring
    top_k: int
    renormalize: bool
    num_expert_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    correction_bias: torch.Tensor | None = None

    @staticmethod
    def from_shape(
        shape: RouterShape, correction_bias: torch.Tensor | None = None
    ) -> RoutingRule:
        """Return the rule of a layer with this shape and its own [E] bias."""
        return RoutingRule(
            scoring=shape.scoring,
            top_k=shape.top_k,
            renormalize=shape.renormalize,
            num_expert_group=shape.num_expert_group,
            topk_group=shape.topk_group,
            routed_scaling_factor=shape.routed_scaling_factor,
            correction_bias=correction_bias,
        )

    @property
    def softmax(self) -> bool:
        """Whether scores are a distribution over experts."""
        return self.scoring in ("softmax", "topk_softmax")

    @property
    def plain(self) -> bool:
        """Whether there are no expert groups, no correction bias and no factor."""
        return (
            self.num_expert_group == 1
            and self.correction_bias is None
            and self.routed_scaling_factor == 1.0
        )

    @property
    def always_renormalizes(self) -> bool:
        """Whether the model's own weights sum to the scaling factor."""
        return self.renormalize or self.scoring == "topk_softmax"


def score_experts(
    logits: torch.Tensor,
    flags: torch.Tensor | None,
    slots: torch.Tensor | None,
    table: LayerTable | None,
    rule: RoutingRule,
    features: Features,
    recalled: Recalled | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the plan's edits of logits and scores, and the model's group choice.

    Source: SteerMoE (arXiv 2509.09660, promote and demote), C3PO (2504.07964) and
    kNN-MoE (2601.02144) (target and mix, the plan's or the row's own).

    Args:
        logits: [T, E] float32.
        flags: [T, E] uint8 of each row, where `features` needs them.
        slots: [T] int; `None` with `Features.NONE`.
        table: The layer's plans; `None` with `Features.NONE`.
        rule: The layer's own rule.
        features: Parts that some slot in use needs.
        recalled: The rows' own targets, where the layer has token memories.

    Returns:
        scores [T, E], the weights before renormalisation, 0 where forbidden; and
        selection keys [T, E], -inf where an expert must not be chosen, for its own or
        its group's sake.
    """
    forbidden = flags & FORBIDDEN > 0 if features & Features.MASK else None
    biased = rule.correction_bias is not None
    steer = bool(features & Features.PROMOTE)
    if features & Features.BIAS:
        logits = logits + table.bias.index_select(0, slots)
    if steer and not biased:
        logits = _steer(logits, flags, forbidden)
    logits = _fill(logits, forbidden, float("-inf"))
    scores = _activate(logits, rule)
    keys = logits
    if biased:
        keys = scores + rule.correction_bias.float()
        if steer:
            keys = _steer(keys, flags, forbidden)
        keys = _fill(keys, forbidden, float("-inf"))
    elif rule.softmax and (features & Features.TARGET or recalled is not None):
        target, mix = _target(slots, table, features, recalled)
        scores = _fill((1 - mix) * scores + mix * target, forbidden, 0.0)
        keys = torch.where(mix > 0, _fill(scores, forbidden, float("-inf")), keys)
    if rule.num_expert_group > 1:
        keys = _keep_best_groups(keys, flags if steer else None, rule)
    return scores, keys


def _target(
    slots: torch.Tensor,
    table: LayerTable,
    features: Features,
    recalled: Recalled | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's target [T, E] and its share [T, 1]; a plan has one kind."""
    if not features & Features.TARGET:
        return recalled.target, recalled.mix[:, None]
    mix = table.mix.index_select(0, slots)[:, None]
    target = table.target.index_select(0, slots)
    if recalled is None:
        return target, mix
    own = recalled.mix[:, None]
    return torch.where(own > 0, recalled.target, target), mix + own


def _activate(logits: torch.Tensor, rule: RoutingRule) -> torch.Tensor:
    if rule.softmax:
        return torch.softmax(logits, dim=1)
    # float64: float32 vector loops and their scalar tails differ in the last bit, so a
    # row's scores would depend on where the row stands in its batch
    exact = logits.double()
    if rule.scoring == "sigmoid":
        return torch.sigmoid(exact).float()
    return torch.nn.functional.softplus(exact).sqrt().float()


def _fill(
    values: torch.Tensor, where: torch.Tensor | None, fill: float
) -> torch.Tensor:
    return values if where is None else values.masked_fill(where, fill)


def _steer(
    values: torch.Tensor, flags: torch.Tensor, forbidden: torch.Tensor | None
) -> torch.Tensor:
    """Move promoted experts above the row's best, demoted ones below its worst."""
    best = _fill(values, forbidden, float("-inf")).amax(dim=1, keepdim=True)
    worst = _fill(values, forbidden, float("inf")).amin(dim=1, keepdim=True)
    values = torch.where(flags & PROMOTE > 0, best + EPS, values)
    return torch.where(flags & DEMOTE > 0, worst - EPS, values)


def _keep_best_groups(
    keys: torch.Tensor, flags: torch.Tensor | None, rule: RoutingRule
) -> torch.Tensor:
    """Set keys [T, E] to -inf outside each row's `topk_group` best groups.

    Source: DeepSeek-V2 and V3 as in vLLM's `grouped_topk`.
    """
    num_tokens, num_experts = keys.shape
    size = num_experts // rule.num_expert_group
    grouped = keys.view(num_tokens, rule.num_expert_group, size)
    group_scores = grouped.amax(dim=2)
    if rule.correction_bias is not None and size > 1:
        group_scores, second = grouped.topk(2, dim=2).values.unbind(dim=2)
        group_scores = group_scores + second.masked_fill(second == float("-inf"), 0.0)
    if flags is not None:
        promoted = (flags & PROMOTE > 0).view(grouped.shape).any(dim=2)
        group_scores = group_scores.masked_fill(promoted, float("inf"))
    best = group_scores.sort(dim=1, descending=True, stable=True).indices
    outside = torch.ones_like(group_scores, dtype=torch.bool)
    outside = outside.scatter(1, best[:, : rule.topk_group], False)
    return grouped.masked_fill(outside[:, :, None], float("-inf")).view(keys.shape)
