# SPDX-License-Identifier: Apache-2.0
"""What the routing kernel demands of its arguments; host code, no device value read."""

from __future__ import annotations

import torch

from moe_tta.kernels.scores import RoutingRule
from moe_tta.kernels.table import LayerTable, Layout

_SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")


def check_rows(
    logits: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor, num_experts: int
) -> None:
    """Raise `ValueError` unless the rows fit the table's experts and each other."""
    shape, device = tuple(logits.shape), logits.device
    if len(shape) != 2 or shape[1] < num_experts or not logits.is_floating_point():
        raise ValueError(
            f"router_logits is {logits.dtype} {shape}, expected floats "
            f"[T, >= {num_experts}]"
        )
    for name, tensor, dtypes in (
        ("slots", slots, (torch.int32, torch.int64)),
        ("positions", positions, (torch.int64,)),
    ):
        fits = tensor.shape == shape[:1] and tensor.is_contiguous()
        if not fits or tensor.dtype not in dtypes or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"expected contiguous {dtypes[-1]} [{shape[0]}] on {device}"
            )


def check_table(table: LayerTable) -> None:
    """Raise `ValueError` unless the table is one layer of a `PlanTable`."""
    packed, num_experts = table.packed, table.bias.shape[1]
    want = (len(table.bias), Layout.of(num_experts).num_bytes)
    if packed.shape != want or packed.dtype != torch.uint8:
        raise ValueError(
            f"table.packed is {packed.dtype} {tuple(packed.shape)}, expected "
            f"{torch.uint8} {want}"
        )
    apart, step = packed.stride()
    if apart % 16 or step != 1 or packed.data_ptr() % 16:
        raise ValueError("table.packed has rows that do not start at 16 bytes")


def check_rule(
    rule: RoutingRule, width: int, num_experts: int, device: torch.device
) -> None:
    """Raise `ValueError` unless the rule suits the number of experts and the width."""
    if rule.scoring not in _SCORINGS:
        raise ValueError(f"scoring is {rule.scoring!r}, expected one of {_SCORINGS}")
    if not 1 <= rule.top_k <= width <= num_experts:
        raise ValueError(
            f"top_k is {rule.top_k} and width {width}, expected "
            f"1 <= top_k <= width <= {num_experts}"
        )
    groups, bias = rule.num_expert_group, rule.correction_bias
    if num_experts % groups or not 1 <= rule.topk_group <= groups:
        raise ValueError(f"{num_experts} experts, {rule.topk_group} of {groups} groups")
    if bias is None:
        return
    fits = bias.shape == (num_experts,) and bias.is_contiguous()
    if not fits or not bias.is_floating_point() or bias.device != device:
        raise ValueError(
            f"correction_bias is {bias.dtype} {tuple(bias.shape)} on {bias.device}, "
            f"expected contiguous floats [{num_experts}] on {device}"
        )
