# SPDX-License-Identifier: Apache-2.0
"""Modules that launch fewer kernels on a GPU: grouped experts and fused norms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from moe_tta.adapter.attention import fuse_attention
from moe_tta.adapter.head import FusedHead


class Order(NamedTuple):
    """Pairs of row and expert, T K of them, sorted by expert."""

    by_expert: torch.Tensor  # [T K] int64, pairs in their new order
    back: torch.Tensor  # [T K] int64, the new place of each pair
    ends: torch.Tensor  # [E] int32, where each expert's pairs end

    @staticmethod
    def of(ids: torch.Tensor, num_experts: int) -> Order:
        """Sort the pairs of `ids` [T, K] int64, without a wait for the device."""
        experts, by_expert = ids.reshape(-1).sort(stable=True)
        places = torch.arange(len(experts), device=ids.device)
        back = torch.empty_like(by_expert).scatter_(0, by_expert, places)
        numbers = torch.arange(num_experts, device=ids.device)
        ends = torch.searchsorted(experts, numbers, right=True, out_int32=True)
        return Order(by_expert, back, ends)


class _Spread(torch.autograd.Function):
    """Rows [T, H] to their pairs [T K, H] in order; back, a row's pairs are summed.

    Autograd would sort once more for the sum, or add in no fixed order.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, by_expert: torch.Tensor, back: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(back)
        ctx.num_rows = len(rows)
        return rows.index_select(0, by_expert // (len(by_expert) // len(rows)))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        pairs = grad.index_select(0, back).view(ctx.num_rows, -1, grad.shape[1])
        return pairs.sum(dim=1), None, None


class _Permute(torch.autograd.Function):
    """Pairs [T K, ...] in another order; back, in the order they came."""

    @staticmethod
    def forward(
        ctx: Any, pairs: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return pairs.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None


class GroupedExperts(nn.Module):
    """What stands for a layer's experts on a GPU, where a loop is bound by launches.

    Same weights, arguments and result as transformers' modules; no wait for the
    device, and gradients are summed in a fixed order.

    Args:
        experts: The module it stands for, with weights [E, 2I, H] (gate first) and
            [E, H, I].
    """

    def __init__(self, experts: nn.Module):
        super().__init__()
        self.gate_up_proj, self.down_proj = experts.gate_up_proj, experts.down_proj
        self.act_fn: Callable[[torch.Tensor], torch.Tensor] = experts.act_fn

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
        order = Order.of(top_k_index, len(self.gate_up_proj))
        x = _Spread.apply(hidden_states, order.by_expert, order.back)
        x = self._products(x, self.gate_up_proj, order)
        gate, up = x.chunk(2, dim=-1)
        x = self._products(self.act_fn(gate) * up, self.down_proj, order)
        x = _Permute.apply(x, order.back, order.by_expert)
        pairs = x.view(*top_k_index.shape, -1) * top_k_weights[:, :, None]
        return pairs.sum(dim=1).to(hidden_states.dtype)

    @staticmethod
    def _products(x: torch.Tensor, weight: torch.Tensor, order: Order) -> torch.Tensor:
        return functional.grouped_mm(x, weight.transpose(1, 2), offs=order.ends)


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
    """Let a transformers model on a GPU launch fewer kernels, with the same weights.

    Args:
        model: Of one of the adapter's families.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "variance_epsilon"):
                setattr(parent, name, FusedNorm(child))
            elif hasattr(child, "gate_up_proj") and hasattr(child, "num_experts"):
                setattr(parent, name, GroupedExperts(child))
    fuse_attention(model)
    model.lm_head = FusedHead(model.lm_head)
