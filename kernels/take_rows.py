# SPDX-License-Identifier: Apache-2.0
"""Copies of rows by their numbers, or of nothing."""

from __future__ import annotations

import torch


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the rows of these numbers; zeros for number -1.

    Args:
        rows: [N, ...].
        index: [L] int64, -1 .. N - 1.

    Returns:
        [L, ...].
    """
    taken = rows.index_select(0, index.clamp_min(0))
    return taken.masked_fill_((index < 0).view(-1, *[1] * (rows.dim() - 1)), 0)
