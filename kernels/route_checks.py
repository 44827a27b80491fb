# SPDX-License-Identifier: Apache-2.0
"""What the routing kernel demands of its arguments; host code, no device value read."""

from __future__ import annotations

import torch

from moe_tta.kernels.scores import RoutingRule
from moe_tta.kernels.table import LayerTable

_SCORINGS = ("softmax", "topk_softmax", "sigmoid", "sqrtsoftplus")
_DTYPES = LayerTable(
    flags=torch.uint8,
    bias=torch.float32,
    target=torch.float32,
    scale=torch.float32,
    mix=torch.float32,
    select=torch.int32,
    k_min=torch.int32,
    k_max=torch.int32,
    renorm=torch.int32,
    select_args=torch.float32,
    seed=torch.int64,
)


def check_rows(
    logits: torch.Tensor,
    slots: torch.Tensor,
    positions: torch.Tensor,
    num_experts: int,
    padding: torch.Tensor | None = None,
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
        ("padding", padding, (torch.bool,)),
    ):
        if tensor is None and name == "padding":
            continue
        fits = tensor.shape == shape[:1] and tensor.is_contiguous()
        if not fits or tensor.dtype not in dtypes or tensor.device != device:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}, "
                f"expected contiguous {dtypes[-1]} [{shape[0]}] on {device}"
            )


def check_table(table: LayerTable, device: torch.device) -> None:
    """Raise `ValueError` unless the fields are one layer's views of a `PlanTable`."""
    num_slots, num_experts = table.bias.shape
    inner = {"select_args": table.select_args.shape[-1]}
    inner.update(dict.fromkeys(("flags", "bias", "target", "scale"), num_experts))
    outer = {}
    for name, tensor, dtype in zip(table._fields, table, _DTYPES, strict=True):
        want = (num_slots, inner[name]) if name in inner else (num_slots,)
        if tensor.shape != want or tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"table.{name} is {tensor.dtype} {tuple(tensor.shape)} on "
                f"{tensor.device}, expected {dtype} {want} on {device}"
            )
        # slots of one kind of field lie equally far apart
        apart = outer.setdefault(want[1:], tensor.stride(0))
        if tensor.stride()[1:] not in ((), (1,)) or tensor.stride(0) != apart:
            raise ValueError(f"table.{name} is no view of one PlanTable's layer")


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
