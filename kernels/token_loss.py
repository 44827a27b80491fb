# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood of one token a row, and its slope in the logits."""

from __future__ import annotations

import torch
from torch.nn import functional


def score_rows(
    logits: torch.Tensor, targets: torch.Tensor, nll: torch.Tensor, slopes: bool
) -> None:
    """Write -log softmax(logits)[target], in nats, of each row to `nll`.

    Computed in float32 or wider.

    Args:
        logits: [N, V]; with `slopes` overwritten by the derivative of each row's value,
            softmax(logits) less 1 at the target.
        targets: [N] int64, 0 .. V - 1.
        nll: [N] float32 or wider.
        slopes: Whether the derivative is wanted.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    nll.copy_(functional.cross_entropy(wide, targets, reduction="none"))
    if slopes:
        shares = torch.softmax(wide, dim=1)
        shares.scatter_add_(1, targets[:, None], -torch.ones_like(shares[:, :1]))
        logits.copy_(shares)
