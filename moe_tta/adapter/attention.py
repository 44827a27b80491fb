# SPDX-License-Identifier: Apache-2.0
"""Attention that launches few kernels: one product, one kernel of norms and rope."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from moe_tta.adapter.packing import Packing
from moe_tta.kernels.rope import HeadLayout, NormWeights, Tables, split_heads

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Projection(NamedTuple):
    """From hidden states to queries, keys and values, by weights of no gradient.

    Attributes:
        maps: Weight [out, H] and bias [out] or `None`, whose outputs follow one
            another: one map where the weights are adjacent in memory, else three.
        norms: Weights of the norms of queries and keys, if there are any.
        layout: Of the joint rows.
    """

    maps: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    norms: NormWeights | None
    layout: HeadLayout

    @staticmethod
    def of(attention: nn.Module) -> Projection:
        """Look at transformers' attention; no weight is copied."""
        linears = [getattr(attention, f"{side}_proj") for side in "qkv"]
        queries, keys = (len(one.weight) // attention.head_dim for one in linears[:2])
        layout = HeadLayout(queries, keys, attention.head_dim)
        norms = None
        if hasattr(attention, "q_norm"):
            norms = attention.q_norm.weight.detach(), attention.k_norm.weight.detach()
            layout = layout._replace(
                per_head=norms[0].numel() == attention.head_dim,
                eps=attention.q_norm.variance_epsilon,
            )
        return Projection(_maps(linears), norms, layout)

    def multiply(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return joint rows [R, T, (Q + 2 K) D] of hidden states [R, T, H]."""
        rows = hidden.reshape(-1, hidden.shape[-1])
        joint = rows.new_empty(len(rows), sum(self.layout.widths))
        for (weight, bias), part in zip(self.maps, self._parts(joint), strict=True):
            if bias is None:
                torch.mm(rows, weight.T, out=part)
            else:
                torch.addmm(bias, rows, weight.T, out=part)
        return joint.view(*hidden.shape[:-1], -1)

    def multiply_back(self, grad: torch.Tensor) -> torch.Tensor:
        """Return the gradient [R, T, H] of hidden states, given that of joint rows."""
        parts = self._parts(grad.flatten(0, 1))
        back = torch.mm(parts[0], self.maps[0][0])
        for part, (weight, _) in zip(parts[1:], self.maps[1:], strict=True):
            back.addmm_(part, weight)
        return back.view(*grad.shape[:-1], -1)

    def _parts(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return rows.split([len(weight) for weight, _ in self.maps], dim=1)


def _maps(linears: Sequence[nn.Linear]) -> tuple:
    weights = _adjoin([linear.weight.detach() for linear in linears])
    biases: list[torch.Tensor] | None = None
    if linears[0].bias is not None:
        biases = _adjoin([linear.bias.detach() for linear in linears])
    if biases is None:
        return tuple((weight, None) for weight in weights)
    if len(weights) == len(biases):
        return tuple(zip(weights, biases, strict=True))
    return tuple((linear.weight.detach(), linear.bias.detach()) for linear in linears)


def _adjoin(parts: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return one view of all rows where they lie one behind the other in memory."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        same = part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        if not (same and part.is_contiguous() and part.storage_offset() == end):
            return parts
        end += part.numel()
    rows = sum(len(part) for part in parts)
    return [first.as_strided((rows, *first.shape[1:]), first.stride())]


class _FusedHeads(torch.autograd.Function):
    """`plain_heads` by the kernels of a GPU, forward and backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, projection: Projection, tables: Tables
    ) -> Heads:
        from moe_tta.kernels.rope_triton import turn_heads

        layout, norms = projection.layout, projection.norms
        joint = projection.multiply(hidden)
        queries, keys = turn_heads(joint, tables, norms, layout)
        ctx.save_for_backward(*tables, *([joint] if norms else []))
        ctx.projection = projection
        values = joint[:, :, -layout.widths[2] :].unflatten(2, (-1, layout.dim))
        return queries, keys, values

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        from moe_tta.kernels.rope_triton import turn_back

        cos, sin, *kept = ctx.saved_tensors
        projection = ctx.projection
        joint = kept[0] if kept else None
        back = turn_back(
            grads, joint, Tables(cos, sin), projection.norms, projection.layout
        )
        return projection.multiply_back(back), None, None


def fused_heads(hidden: torch.Tensor, projection: Projection, tables: Tables) -> Heads:
    """Do what `plain_heads` does, with its gradient, by Triton kernels."""
    return _FusedHeads.apply(hidden, projection, tables)


def plain_heads(hidden: torch.Tensor, projection: Projection, tables: Tables) -> Heads:
    """Return queries [R, T, Q, D], keys and values [R, T, K, D], normed and turned.

    Args:
        hidden: [R, T, H].
        projection: The layer's.
        tables: Of the rows' positions.
    """
    parts = [functional.linear(hidden, *one) for one in projection.maps]
    joint = torch.cat(parts, dim=-1)
    return split_heads(joint, tables, projection.norms, projection.layout)


class FusedAttention(nn.Module):
    """What stands for a layer's attention on a GPU: few launches.

    Same weights, arguments and result as transformers' attention of the adapter's
    families in evaluation, for `sdpa`. Norms of queries and keys and the rotation are
    computed in float32 and rounded once. On a CPU the same in plain torch.

    Args:
        attention: The module it stands for. Where its weights are rows of one tensor,
            as vLLM's are, queries, keys and values come of one product.
    """

    def __init__(self, attention: nn.Module):
        super().__init__()
        for name, child in attention.named_children():
            self.add_module(name, child)
        self.layer_idx, self.scaling = attention.layer_idx, attention.scaling
        self._projection = Projection.of(attention)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        packing: Packing | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend.

        Args:
            hidden_states: [R, T, H]; packed, [1, N, H].
            position_embeddings: Cosines and sines, each [R or 1, T, D]; packed,
                [1, N, D].
            attention_mask: [R or 1, 1, T, keys] bool; `None` is causal.
            past_key_values: Has `update(keys, values, layer)` for [R, K, T, D].
            packing: Of the rows, if they are packed; then the mask is that of [R, T].

        Returns:
            As `hidden_states`, and `None` for the attention's weights.
        """
        project = fused_heads if hidden_states.is_cuda else plain_heads
        heads = project(hidden_states, self._projection, Tables(*position_embeddings))
        if packing is not None:
            heads = [packing.spread(part) for part in heads]
        queries, keys, values = (part.transpose(1, 2) for part in heads)
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, self.layer_idx)
        mixed = self._attend(queries, keys, values, attention_mask).transpose(1, 2)
        if packing is not None:
            mixed = packing.gather(mixed)
        return self.o_proj(mixed.flatten(2)), None

    def _attend(
        self,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        grouped = queries.shape[1] != keys.shape[1]
        if grouped and mask is not None:
            # with a mask no fused kernel of torch knows shared heads
            groups = queries.shape[1] // keys.shape[1]
            keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        return functional.scaled_dot_product_attention(
            queries,
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and queries.shape[2] > 1,
            scale=self.scaling,
            enable_gqa=grouped and mask is None,
        )


def fuse_attention(model: nn.Module) -> None:
    """Let `FusedAttention` stand for every attention of a transformers model."""
    for layer in model.model.layers:
        layer.self_attn = FusedAttention(layer.self_attn)
