# SPDX-License-Identifier: Apache-2.0
"""Random weights whose routers choose as trained ones do."""

from __future__ import annotations

import torch


def spread_routers(model: torch.nn.Module, num_experts: int) -> int:
    """Make norms ones and draw routers anew, so that logits are about N(0, 1).

    vLLM's random weights are at most 0.001, norms too. Logits are then about 1e-5 and
    their softmax has ties in every row, which a trained router's has not. On CPUs vLLM
    packs weights when it loads them, and none are found.

    Args:
        model: vLLM's, changed in place; captured graphs stay right.
        num_experts: Of each MoE layer.

    Returns:
        How many routers were found; the same draw in every process.
    """
    routers = 0
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and name.endswith("norm.weight"):
            weight.data.fill_(1.0)
        elif weight.dim() == 2 and len(weight) == num_experts:
            rng = torch.Generator().manual_seed(routers)
            drawn = torch.randn(weight.shape, generator=rng) / weight.shape[1] ** 0.5
            weight.data.copy_(drawn)
            routers += 1
    return routers
