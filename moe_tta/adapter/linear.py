# SPDX-License-Identifier: Apache-2.0
"""Linear maps by frozen weights that may be stored in another dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional


class _FrozenLinear(torch.autograd.Function):
    """x W^T, with the weight cast anew for each product, so that no cast is kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (weight,) = ctx.saved_tensors
        # so and not as a plain product, which is many times slower in bfloat16 on CPU
        return functional.linear(grad, weight.to(grad.dtype).T), None


def frozen_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return x W^T, differentiable in x alone.

    Args:
        x: [..., in], the dtype of the product.
        weight: [out, in], any floating dtype; at most one cast of it exists at a time.
    """
    return _FrozenLinear.apply(x, weight)


class FrozenLinear(nn.Module):
    """What stands for `nn.Linear` where weights are not in the dtype of activations."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out] in the dtype of `x`."""
        y = frozen_linear(x, self.weight)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class FrozenEmbedding(nn.Module):
    """What stands for `nn.Embedding` where rows are wanted in another dtype."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype):
        super().__init__()
        self.weight, self.dtype = embedding.weight, dtype

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look ids [...] up as rows [..., H]."""
        return functional.embedding(ids, self.weight).to(self.dtype)
