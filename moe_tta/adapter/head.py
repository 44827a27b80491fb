# SPDX-License-Identifier: Apache-2.0
"""The last product and the loss on a GPU, without logits in float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from moe_tta.kernels import token_loss

CHUNK = 1024  # rows whose logits [CHUNK, V] exist at the same time
_ALIGNED = 8  # logits: a row of them begins at a multiple of 16 bytes in bfloat16


class _TokenLoss(torch.autograd.Function):
    """-log P of targets, with the slope in the rows taken at once, forward.

    A value depends on its own row alone. So its derivative is known before the factor
    that comes backward, and no logits need be kept or made twice.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        score = _scorer(rows.device)
        wanted = ctx.needs_input_grad[0]
        logits = _room(rows, min(CHUNK, len(rows)), len(weight))
        wide = torch.promote_types(rows.dtype, torch.float32)
        nll = torch.empty(len(rows), dtype=wide, device=rows.device)
        slopes = torch.empty_like(rows) if wanted else None
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            made = logits[: len(rows[part])]
            torch.mm(rows[part], weight.T, out=made)
            score(made, targets[part], nll[part], wanted)
            if slopes is not None:
                torch.mm(made, weight, out=slopes[part])
        if slopes is not None:
            ctx.save_for_backward(slopes)
        return nll

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slopes,) = ctx.saved_tensors
        # one kernel: the product in float32, rounded to the dtype of the rows
        back = torch.mul(slopes, grad[:, None], out=torch.empty_like(slopes))
        return back, None, None


def _room(like: torch.Tensor, count: int, vocab: int) -> torch.Tensor:
    """Return memory for logits [count, V] whose rows are aligned."""
    pitch = -(-vocab // _ALIGNED) * _ALIGNED
    buffer = like.new_empty(count, pitch)
    if pitch > vocab:
        # some products in bfloat16 on CPU read beyond a row, times 0: no NaN there
        buffer[:, vocab:] = 0
    return buffer[:, :vocab]


def _scorer(device: torch.device) -> Callable[..., None]:
    """Return the kernel's `score_rows` on a GPU, and the plain one elsewhere."""
    if device.type != "cuda":
        return token_loss.score_rows
    from moe_tta.kernels import token_loss_triton

    return token_loss_triton.score_rows


class FusedHead(nn.Module):
    """What stands for `lm_head` on a GPU: the same map, and the loss of its logits.

    Args:
        linear: The module it stands for, without bias.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Map [..., H] to logits [..., V]."""
        return functional.linear(rows, self.weight)

    def nll(self, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return -log P of each target in nats, [N] float32 or wider.

        Beside the result it makes the logits of `CHUNK` rows, once, in the dtype of
        the rows, and where `rows` takes a gradient as many bytes as `rows` has.

        Args:
            rows: [N, H] after the final norm, contiguous.
            targets: [N] int64 token ids, contiguous.
        """
        return _TokenLoss.apply(rows, self.weight, targets)
