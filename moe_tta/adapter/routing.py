# SPDX-License-Identifier: Apache-2.0
"""Routers that obey additive vectors and given distributions, differentiably.

The rule is the law of routing itself (`moe_tta.kernels.reference.route`), called with a
table whose `bias` and `target` may require gradients: ids and weights are the law's by
construction. Which experts are chosen is piecewise constant, so the gradient flows
through the weights of the chosen experts alone: d loss / d delta_e is the softmax's,
and an expert that no row chose gets only what the shared normaliser gives it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from moe_tta.kernels.reference import Routing, model_routing, route
from moe_tta.kernels.scores import RoutingRule
from moe_tta.kernels.table import Features, LayerTable, PlanTable
from moe_tta.shape import RouterShape

Observer = Callable[[torch.Tensor, Routing], None]
# logits [T, E], rule, slots [T], bias [S, E] -> weights [T, K], ids [T, K] int64
BiasedTopk = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class LayerEdit(NamedTuple):
    """What one layer's router does with the rows of a pass; slot 0 is the model's own.

    `bias` and `target` leave slot 0 out. `target` is `None` for none; with it, a row's
    distribution is replaced.
    """

    slots: torch.Tensor  # [T] int64, 0 .. S
    bias: torch.Tensor | None = None  # [S, E] f32, added to the logits
    target: torch.Tensor | None = None  # [S, E] f32, instead of softmax(logits)


class EditTables:
    """Neutral tables of the law to put edits into, kept by number of slots."""

    def __init__(self, shape: RouterShape, device: torch.device):
        self._shape, self._device = shape, device
        self._neutral: dict[int, LayerTable] = {}

    def table(self, edit: LayerEdit) -> tuple[LayerTable, Features]:
        """Return the law's table for an edit and the features it uses."""
        values = edit.bias if edit.target is None else edit.target
        neutral = self._get(len(values))
        features, fields = Features.NONE, {}
        if edit.bias is not None:
            features |= Features.BIAS
            fields["bias"] = _after_zero(edit.bias)
        if edit.target is not None:
            features |= Features.TARGET
            fields["target"] = _after_zero(edit.target)
            fields["mix"] = _after_zero(torch.ones_like(edit.target[:, 0]))
        return neutral._replace(**fields), features

    def _get(self, slots: int) -> LayerTable:
        if slots not in self._neutral:
            self._neutral[slots] = PlanTable(self._shape, slots, self._device).layer(0)
        return self._neutral[slots]


def _after_zero(values: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(values[:1]), values])


class AdaptedRouter(nn.Module):
    """What stands for a transformers router: the same results, by the law.

    Args:
        weight: [E, H].
        shape: The model's routers.
        tables: Shared by all routers of a model.
    """

    def __init__(self, weight: nn.Parameter, shape: RouterShape, tables: EditTables):
        super().__init__()
        self.weight = weight
        self._rule = RoutingRule.from_shape(shape)
        self._tables = tables
        # set by the pass that runs this layer, for this layer's call alone
        self.edit: LayerEdit | None = None
        self.observe: Observer | None = None
        self._topk: BiasedTopk | None = None

    def fuse(self) -> None:
        """Route by Triton kernels where they know the rule, but for distributions."""
        from moe_tta.kernels.biased_topk import biased_topk, is_plain_softmax

        if is_plain_softmax(self._rule):
            self._topk = biased_topk

    def forward(
        self, hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Route rows [..., H]: logits [T, E], weights [T, K] f32, ids [T, K] int64."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        logits = functional.linear(rows, self.weight.to(rows.dtype))
        edit = self.edit
        if self._topk is not None and (edit is None or edit.target is None):
            weights, ids = self._topk(logits, self._rule, *(edit or ())[:2])
            chosen = Routing(weights, ids)
        else:
            chosen = self._by_law(logits)
        if self.observe is not None:
            self.observe(logits, chosen._replace(topk_ids=chosen.topk_ids.int()))
        return logits, chosen.topk_weights, chosen.topk_ids.long()

    def _by_law(self, logits: torch.Tensor) -> Routing:
        width = self._rule.top_k
        if self.edit is None:
            return model_routing(logits, self._rule, width)
        table, features = self._tables.table(self.edit)
        slots = self.edit.slots  # stand in for positions, which no edit reads
        return route(logits, slots, slots, table, self._rule, width, 0, features)
