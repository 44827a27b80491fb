# SPDX-License-Identifier: Apache-2.0
"""Modules that launch fewer kernels on a GPU: experts, routers and norms."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from moe_tta.adapter.attention import fuse_attention
from moe_tta.adapter.grouped import GroupedExperts
from moe_tta.adapter.head import FusedHead
from moe_tta.adapter.routing import AdaptedRouter
from moe_tta.kernels.pairs import PLAIN, PairWork


class FusedNorm(nn.Module):
    """What stands for a transformers RMS norm on a GPU: one kernel instead of six.

    In bfloat16 it rounds once, after the weight, where transformers does before, too.

    Args:
        norm: The module it stands for.
    """

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Norm the last dimension of [..., H]."""
        return functional.rms_norm(
            hidden_states, self.weight.shape, self.weight, self.variance_epsilon
        )


def fuse(model: nn.Module) -> None:
    """Let a transformers model launch fewer kernels, with the same weights.

    On a GPU routers and the work around experts' products are Triton kernels; on a CPU
    what these must equal.

    Args:
        model: Of one of the adapter's families, with the adapter's routers in place.

    Raises:
        AdapterError: see `GroupedExperts`.
    """
    on_gpu = next(model.parameters()).is_cuda
    work = _triton_work() if on_gpu else PLAIN
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "variance_epsilon"):
                setattr(parent, name, FusedNorm(child))
            elif hasattr(child, "gate_up_proj") and hasattr(child, "num_experts"):
                setattr(parent, name, GroupedExperts(child, work))
            elif isinstance(child, AdaptedRouter) and on_gpu:
                child.fuse()
    fuse_attention(model)
    model.lm_head = FusedHead(model.lm_head)


def _triton_work() -> PairWork:
    from moe_tta.kernels.pairs_triton import TRITON  # machines without a GPU lack it

    return TRITON
