# SPDX-License-Identifier: Apache-2.0
"""Softmax routing with vectors added to logits, differentiable, as Triton kernels.

What `reference.route` and autograd through it give for plans with `bias` only: one
launch forward; backward one, and one more for the vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch.autograd.function import once_differentiable

from moe_tta.kernels.biased_topk_rows import choose_experts, grad_logits, sum_slots
from moe_tta.kernels.launch import Launcher, is_nvidia
from moe_tta.kernels.scores import RoutingRule

_ROWS = 8  # of a program
_SCAN = 1024  # slots that a program of the vectors' gradient looks at together
_SUMMED = 32  # rows that it adds together


def is_plain_softmax(rule: RoutingRule) -> bool:
    """Return whether `biased_topk` knows the rule."""
    return rule.plain and rule.softmax


def biased_topk(
    router_logits: torch.Tensor,
    rule: RoutingRule,
    slots: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose and weigh each row's experts, by the softmax of logits plus vector.

    Ids equal the law's, weights and gradients differ by float32 rounding only. The
    gradient flows through the chosen weights; sums have a fixed order. Rows with NaN
    or infinity get ids in range, and nothing else is promised.

    Args:
        router_logits: [T, E] contiguous, any float dtype, T at least 1.
        rule: One that `is_plain_softmax`.
        slots: [T] int32 or int64 contiguous, 0 .. S: 0 adds nothing.
        bias: [S, E] f32, rows apart by any stride; its first row is slot 1's.

    Returns:
        weights [T, K] f32 and ids [T, K] int64 by falling weight, ties by lowest id.
    """
    kind = rule.top_k, rule.always_renormalizes, bias is not None
    if bias is None:
        slots = bias = router_logits.detach()  # stand in, and are not read
    elif bias.stride(1) != 1:
        bias = bias.contiguous()
    return _BiasedTopk.apply(router_logits, slots, bias, kind)


class _BiasedTopk(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        slots: torch.Tensor,
        bias: torch.Tensor,
        kind: tuple[int, bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (num_rows, num_experts), width = logits.shape, kind[0]
        weights = torch.empty(
            (num_rows, width), dtype=torch.float32, device=logits.device
        )
        ids = torch.empty((num_rows, width), dtype=torch.int64, device=logits.device)
        ctx.kind = (
            *(num_experts, *kind, bias.stride(0)),
            *(logits.dtype, slots.dtype, is_nvidia(logits.device)),
        )
        _forward(
            _grid(num_rows),
            (logits, slots, bias, weights, ids),
            (num_rows,),
            ctx.kind,
        )
        ctx.save_for_backward(logits, slots, bias, weights, ids)
        ctx.mark_non_differentiable(ids)
        ctx.set_materialize_grads(False)
        return weights, ids

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad: torch.Tensor | None, _: Any
    ) -> tuple[torch.Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        logits, slots, bias, weights, ids = ctx.saved_tensors
        num_rows, num_experts = logits.shape
        rounded = torch.empty_like(logits)
        shifted = torch.empty_like(logits, dtype=torch.float32)
        _backward(
            _grid(num_rows),
            (logits, slots, bias, weights, ids, grad.contiguous(), rounded, shifted),
            (num_rows,),
            ctx.kind,
        )
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
            _sum_slots(
                (len(bias), 1, 1),
                (shifted, slots, grad_bias),
                (num_rows,),
                (num_experts, slots.dtype),
            )
        return rounded, None, grad_bias, None


def _grid(num_rows: int) -> tuple[int, int, int]:
    return -(-num_rows // _ROWS), 1, 1


def _constants(
    num_experts: int,
    width: int,
    renormalizes: bool,
    biased: bool,
    bias_stride: int,
    logits: torch.dtype,
    slots: torch.dtype,
    exact: bool,
) -> dict:
    return {
        "E": num_experts,
        "BLOCK_E": triton.next_power_of_2(num_experts),
        "K": width,
        "BLOCK_K": triton.next_power_of_2(width),
        "ROWS": _ROWS,
        "RENORMALIZES": renormalizes,
        "BIASED": biased,
        "BIAS_STRIDE": bias_stride,
        "EXACT": exact,
        "num_warps": 4,
    }


def _backward_constants(*kind: Any) -> dict:
    constants = _constants(*kind)
    del constants["BLOCK_K"]
    return constants


def _sum_constants(num_experts: int, _: torch.dtype) -> dict:
    return {
        "E": num_experts,
        "BLOCK_E": triton.next_power_of_2(num_experts),
        "SCAN": _SCAN,
        "SUMMED": _SUMMED,
        "num_warps": 4,
    }


_forward = Launcher(choose_experts, _constants)
_backward = Launcher(grad_logits, _backward_constants)
_sum_slots = Launcher(sum_slots, _sum_constants)
