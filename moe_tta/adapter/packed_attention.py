# SPDX-License-Identifier: Apache-2.0
"""Transformers' own attention on packed rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from moe_tta.adapter.packing import Packing

PACKED_SDPA = "moe_tta_packed_sdpa"  # what configs call it


def packed_sdpa(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Do transformers' `sdpa` in the padded layout.

    Decoder layers of the adapter's families hand keyword arguments that they do not
    know to attention, and attention to this function.

    Args:
        module: The attention.
        query: [1, heads, N, D], with positions in it.
        key: The same of the key heads.
        value: As `key`.
        attention_mask: [1, 1, T, T] bool of each text; `None` is causal.
        packing: Of the rows; `None` where they are [R, heads, T, D] already.
        kwargs: As transformers gives them.

    Returns:
        [1, N, heads, D], and `None` for the attention's weights.
    """
    heads = query, key, value
    if packing is None:
        return sdpa_attention_forward(module, *heads, attention_mask, **kwargs)
    apart = [packing.spread(x.transpose(1, 2)).transpose(1, 2) for x in heads]
    mixed, _ = sdpa_attention_forward(module, *apart, attention_mask, **kwargs)
    return packing.gather(mixed), None


AttentionInterface.register(PACKED_SDPA, packed_sdpa)
