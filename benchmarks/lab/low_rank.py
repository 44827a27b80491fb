# SPDX-License-Identifier: Apache-2.0
"""The trainable form of the upcycled model: one dense FFN plus low-rank experts.

All experts of a layer share the dense matrices, so those are multiplied once per
token; each expert adds its low-rank difference. This is the function that the built
MoE computes; at rank 7 and top-2 it takes 27 % more multiplications than the dense
FFN.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from moe_tta.lab import differences

SHARED = {"gate": "left", "up": "left", "down": "right"}  # the wide factor


def low_rank(
    x: torch.Tensor, chosen: torch.Tensor, left: torch.Tensor, right: torch.Tensor
) -> torch.Tensor:
    """Applies the difference of each token's expert.

    Args:
        x: [tokens, in_features].
        chosen: [tokens, experts], one where the token goes, zero elsewhere.
        left: [experts or 1, out_features, rank].
        right: [experts or 1, rank, in_features].

    Returns:
        [tokens, out_features].
    """
    rank = right.shape[1]
    hidden = F.linear(x, right.flatten(0, 1)).unflatten(1, (-1, rank))
    hidden = hidden * chosen[:, :, None]  # [tokens, experts, rank]
    if left.shape[0] == 1:
        return F.linear(hidden.sum(1), left[0])
    return hidden.flatten(1) @ left.transpose(1, 2).flatten(0, 1)


def moe_ffn(
    x: torch.Tensor,
    router: torch.Tensor,
    dense: dict[str, torch.Tensor],
    factors: dict[str, torch.Tensor],
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The FFN of an MoE layer and its load-balance loss.

    Args:
        x: [tokens, hidden_size].
        router: [experts, hidden_size].
        dense: ``gate``, ``up`` and ``down`` of the dense FFN.
        factors: ``{gate,up,down}.{left,right}`` as in `low_rank`.

    Returns:
        [tokens, hidden_size] and a scalar that is one when the load is even (Switch
        Transformer, arXiv:2101.03961, equation 4, over all top-k slots).
    """
    factors = {name: factor.to(x.dtype) for name, factor in factors.items()}
    probs = F.linear(x, router.to(x.dtype)).float().softmax(-1)
    weights, experts = probs.topk(top_k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    slots = F.one_hot(experts, router.shape[0]).to(x.dtype)  # [tokens, k, experts]
    base = {name: F.linear(x, dense[name]) for name in ("gate", "up")}
    total, extra = 0, 0
    for slot in range(top_k):
        chosen = slots[:, slot]
        gate, up = (
            base[m] + low_rank(x, chosen, factors[f"{m}.left"], factors[f"{m}.right"])
            for m in ("gate", "up")
        )
        inner = F.silu(gate) * up * weights[:, slot, None].to(x.dtype)
        total = total + inner
        extra = extra + low_rank(
            inner, chosen, factors["down.left"], factors["down.right"]
        )
    load = slots.float().mean((0, 1))
    balance = router.shape[0] * (load * probs.mean(0)).sum()
    return F.linear(total, dense["down"]) + extra, balance


class LowRankMoE(nn.Module):
    """Replaces a dense FFN; ``balance`` holds the last call's load-balance loss.

    With ``dense_only`` it computes the dense FFN.
    """

    ffn = staticmethod(moe_ffn)

    def __init__(self, mlp: nn.Module, num_experts: int, rank: int, share: bool):
        super().__init__()
        self.dense_only = False
        names = differences.MATRICES
        self.dense = {n: getattr(mlp, f"{n}_proj").weight.detach() for n in names}
        hidden = self.dense["gate"].shape[1]
        # RMS-normed inputs of about unit size give router logits of about unit size.
        router = torch.randn(num_experts, hidden) / math.sqrt(hidden)
        self.router = nn.Parameter(router)
        self.factors = nn.ParameterDict()
        for name, weight in self.dense.items():
            out, inner = weight.shape
            count = {"left": num_experts, "right": num_experts}
            if share:
                count[SHARED[name]] = 1
            left = torch.zeros(count["left"], out, rank)
            right = torch.randn(count["right"], rank, inner) / math.sqrt(inner)
            self.factors[f"{name}_left"] = nn.Parameter(left)
            self.factors[f"{name}_right"] = nn.Parameter(right)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.dense_only:
            gate, up = (F.linear(x, self.dense[name]) for name in ("gate", "up"))
            return F.linear(F.silu(gate) * up, self.dense["down"])
        factors = {n.replace("_", "."): f for n, f in self.factors.items()}
        out, self.balance = self.ffn(
            x.flatten(0, 1), self.router, self.dense, factors, 2
        )
        return out.view_as(x)


def upcycle(
    model: PreTrainedModel, num_experts: int, rank: int, share: bool
) -> list[LowRankMoE]:
    """Replaces every FFN of a dense model, in place, and freezes the rest.

    Args:
        rank: of the differences; `share` makes one factor of each common to the
            experts of a layer (see `SHARED`).
    """
    model.requires_grad_(False)
    blocks = []
    for layer in model.model.layers:
        block = LowRankMoE(layer.mlp, num_experts, rank, share)
        layer.mlp = block.to(model.device)
        blocks.append(layer.mlp)
    return blocks


@contextmanager
def as_dense(blocks: list[LowRankMoE]) -> Iterator[None]:
    """Within the context the model is the dense one."""
    for block in blocks:
        block.dense_only = True
    try:
        yield
    finally:
        for block in blocks:
            block.dense_only = False


@torch.no_grad()
def export(blocks: list[LowRankMoE]) -> dict[str, torch.Tensor]:
    """Quantises trained differences to the form `moe_tta.lab.differences` stores."""
    tensors = {"router": torch.stack([b.router for b in blocks]).bfloat16().cpu()}
    for name in differences.MATRICES:
        left, right = (
            torch.stack([block.factors[f"{name}_{side}"] for block in blocks]).cpu()
            for side in ("left", "right")
        )
        parts = differences.quantise(left, right)
        tensors |= {f"{name}.{part}": value for part, value in parts.items()}
    return tensors
