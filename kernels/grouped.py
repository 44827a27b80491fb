# SPDX-License-Identifier: Apache-2.0
"""A layer's experts as grouped products, differentiable in rows and weights of pairs.

One autograd function, so that little is kept and nothing is made twice: of each pair
gate and up before the activation, of each row the weights and where its pairs stand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moe_tta.kernels.pairs import PairOrder, PairWork


def grouped_experts(
    hidden_states: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_proj: torch.Tensor,
    down_proj: torch.Tensor,
    work: PairWork,
) -> torch.Tensor:
    """Return the weighted sum [T, H] of each row's experts W2 (silu(gate) up).

    There is no wait for the device, and sums have a fixed order. Weights of experts
    take no gradient.

    Source: the gradient of a pair's weight without its output, as in SonicMoE (arXiv
    2512.14080).

    Args:
        hidden_states: [T, H], T at least 1.
        topk_ids: [T, K] int32 or int64, 0 to E - 1.
        topk_weights: [T, K] f32.
        gate_up_proj: [E, 2 I, H], gate first; H and I times 2 or 4 bytes are multiples
            of 16.
        down_proj: [E, H, I].
        work: What does it, product by product.
    """
    return _GroupedExperts.apply(
        hidden_states, topk_ids, topk_weights, gate_up_proj, down_proj, work
    )


class _GroupedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_states: torch.Tensor,
        topk_ids: torch.Tensor,
        topk_weights: torch.Tensor,
        gate_up_proj: torch.Tensor,
        down_proj: torch.Tensor,
        work: PairWork,
    ) -> torch.Tensor:
        topk_weights = topk_weights.contiguous()
        order = work.order_pairs(topk_ids.contiguous(), len(gate_up_proj))
        rows = hidden_states.contiguous()
        gate_up = work.multiply(rows, gate_up_proj.mT, order, from_rows=True)
        y = work.multiply(work.silu_and_mul(gate_up), down_proj.mT, order)
        ctx.save_for_backward(gate_up, topk_weights, *order, gate_up_proj, down_proj)
        ctx.work = work
        return work.sum_pairs(y, order, topk_weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gate_up, topk_weights, *places, gate_up_proj, down_proj = ctx.saved_tensors
        order, work, with_rows = PairOrder(*places), ctx.work, ctx.needs_input_grad[0]
        slope = work.multiply(grad.contiguous(), down_proj, order, from_rows=True)
        grad_weights, slope = work.silu_and_mul_backward(
            gate_up, slope, topk_weights, order, with_rows
        )
        rows = None
        if with_rows:
            rows = work.sum_pairs(work.multiply(slope, gate_up_proj, order), order)
        return rows, None, grad_weights, None, None, None
