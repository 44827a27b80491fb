# SPDX-License-Identifier: Apache-2.0
"""Experts whose matrices lie apart, as most checkpoints store them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from moe_tta.adapter.linear import frozen_linear


class MappedExperts(nn.Module):
    """A layer's experts as views of a checkpoint: nothing is stacked, so not copied.

    transformers wants [E, 2I, H] and [E, H, I] in one piece; a checkpoint that stores
    experts one by one has no such piece. Same arguments and result as its modules.

    Args:
        gate: E matrices [I, H].
        up: E matrices [I, H].
        down: E matrices [H, I].
        act_fn: The activation of the gate.
    """

    def __init__(
        self,
        gate: Sequence[torch.Tensor],
        up: Sequence[torch.Tensor],
        down: Sequence[torch.Tensor],
        act_fn: Callable[[torch.Tensor], torch.Tensor],
    ):
        super().__init__()
        self.matrices = tuple(zip(gate, up, down, strict=True))
        self.act_fn = act_fn

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted sum of each row's experts.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K] int64.
            top_k_weights: [T, K], float32.

        Returns:
            [T, H] in the dtype of `hidden_states`, summed in float32 or wider.
        """
        # index_select throughout: its gradient is many times faster than indexing's
        flat = top_k_index.reshape(-1)
        order = flat.argsort(stable=True)  # [T K], grouped by expert
        counts = torch.bincount(flat, minlength=len(self.matrices)).tolist()
        rows = order // top_k_index.shape[1]
        shares = top_k_weights.reshape(-1).index_select(0, order)
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        out = torch.zeros_like(hidden_states, dtype=wide)
        parts = rows.split(counts), shares.split(counts)
        groups = zip(self.matrices, *parts, strict=True)
        for (gate, up, down), picked, weights in groups:
            if len(picked) == 0:
                continue
            x = hidden_states.index_select(0, picked)
            x = self.act_fn(frozen_linear(x, gate)) * frozen_linear(x, up)
            y = frozen_linear(x, down) * weights[:, None].to(wide)
            out.index_add_(0, picked, y)
        return out.to(hidden_states.dtype)
