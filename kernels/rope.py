# SPDX-License-Identifier: Apache-2.0
"""From one product to attention's heads: norms of queries and keys, and rotation."""

from __future__ import annotations

from typing import NamedTuple

import torch


class HeadLayout(NamedTuple):
    """How a joint row of queries, keys and values is divided, and normed.

    Attributes:
        queries: Q, number of query heads, which come first.
        keys: K, number of key heads, then as many of values.
        dim: D, numbers of a head, even.
        per_head: Whether queries and keys are normed head by head (Qwen3-MoE), over
            their whole width (OLMoE), or not at all (`None`).
        eps: Of these norms.
    """

    queries: int
    keys: int
    dim: int
    per_head: bool | None = None
    eps: float = 0.0

    @property
    def widths(self) -> tuple[int, int, int]:
        """Numbers of a row's queries, keys and values."""
        return self.queries * self.dim, self.keys * self.dim, self.keys * self.dim


class Tables(NamedTuple):
    """Cosines and sines of each position's angles, [R or 1, T, D], contiguous.

    The scaling that some types of rope ask for is in them.
    """

    cos: torch.Tensor
    sin: torch.Tensor


# weights of the norms of queries and of keys: [D] each, or [Q D] and [K D]
NormWeights = tuple[torch.Tensor, torch.Tensor]


def split_heads(
    joint: torch.Tensor,
    tables: Tables,
    norms: NormWeights | None,
    layout: HeadLayout,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries [R, T, Q, D], keys and values [R, T, K, D] of joint rows.

    Queries and keys are normed and turned in float32 or wider, and rounded once.

    Source: RoFormer (arXiv 2104.09864), equation 34, with number i of a head paired
    with number i + D/2, as checkpoints of these families have it.

    Args:
        joint: [R, T, (Q + 2 K) D].
        tables: Of the rows' positions.
        norms: `None` where the layout has no norm.
        layout: Of the rows.
    """
    parts = joint.split(layout.widths, dim=-1)
    queries, keys, values = (part.unflatten(-1, (-1, layout.dim)) for part in parts)
    weights = norms or (None, None)
    turned = [
        _turn(_norm(heads, weight, layout), tables).to(joint.dtype)
        for heads, weight in zip((queries, keys), weights, strict=True)
    ]
    return turned[0], turned[1], values


def _norm(
    heads: torch.Tensor, weight: torch.Tensor | None, layout: HeadLayout
) -> torch.Tensor:
    """Divide [..., heads, D] by the root of the mean square, and weigh."""
    wide = heads.to(torch.promote_types(heads.dtype, torch.float32))
    if weight is None:
        return wide
    dims = (-1,) if layout.per_head else (-2, -1)
    size = wide.square().mean(dim=dims, keepdim=True)
    return wide * torch.rsqrt(size + layout.eps) * weight.view(-1, layout.dim)


def _turn(heads: torch.Tensor, tables: Tables) -> torch.Tensor:
    cos, sin = (table.to(heads.dtype)[:, :, None] for table in tables)
    low, high = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat([-high, low], dim=-1) * sin
