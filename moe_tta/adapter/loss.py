# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood of tokens without a vocabulary-wide tensor for all rows."""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from moe_tta.adapter.head import FusedHead
from moe_tta.adapter.model import AdapterModel

CHUNK = 256  # rows whose logits [CHUNK, V] exist at the same time


def token_nll(
    model: AdapterModel, hidden: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Return -log P of each target in nats, [N] float32 or wider.

    Logits are made for `CHUNK` rows at a time, forward and again backward; by a fused
    head once, for `head.CHUNK` rows.

    Args:
        model: The adapter.
        hidden: [N, H] after the last decoder layer, before the final norm.
        targets: [N] token ids.
    """
    head = model.lm.lm_head
    if isinstance(head, FusedHead):
        return head.nll(model.lm.model.norm(hidden), targets)

    def chunk_nll(rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = model.lm.lm_head(model.lm.model.norm(rows))
        wide = torch.promote_types(logits.dtype, torch.float32)
        return functional.cross_entropy(logits.to(wide), wanted, reduction="none")

    parts = [
        checkpoint(chunk_nll, *part, use_reentrant=False, preserve_rng_state=False)
        for part in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    ]
    return torch.cat(parts)


def mean_by_owner(
    values: torch.Tensor, owners: torch.Tensor, count: int, weights: torch.Tensor
) -> torch.Tensor:
    """Return each owner's weighted mean [count]; NaN for an owner of no value.

    Args:
        values: [N].
        owners: [N] int64, 0 .. count - 1.
        count: Number of owners.
        weights: [N], not negative.
    """
    weights = weights.to(values.dtype)
    zeros = values.new_zeros(count)
    totals = zeros.index_add(0, owners, weights)
    return zeros.index_add(0, owners, values * weights) / totals
