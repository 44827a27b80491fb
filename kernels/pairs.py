# SPDX-License-Identifier: Apache-2.0
"""Grouped products of experts and the work around them: what kernels must equal.

T rows go to K experts each: T K *pairs*, which grouped products want sorted by expert.
A pair's *place* is where it then stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional


class PairOrder(NamedTuple):
    """Pairs of row and expert sorted by expert, then by row and column."""

    places: torch.Tensor  # [T, K] int32, the place of each pair
    pairs: torch.Tensor  # [T K] int32, the pair (row K + column) of each place
    ends: torch.Tensor  # [E] int32, where each expert's places end


def order_pairs(ids: torch.Tensor, num_experts: int) -> PairOrder:
    """Sort pairs, without a wait for the device.

    Args:
        ids: [T, K] int32 or int64, 0 to E - 1.
        num_experts: E.
    """
    experts, pairs = ids.reshape(-1).sort(stable=True)
    numbers = torch.arange(len(pairs), device=ids.device, dtype=torch.int32)
    places = torch.empty_like(numbers).scatter_(0, pairs, numbers)
    every = torch.arange(num_experts, device=ids.device)
    ends = torch.searchsorted(experts, every.to(ids.dtype), right=True, out_int32=True)
    return PairOrder(places.view(ids.shape), pairs.int(), ends)


def spread_rows(rows: torch.Tensor, order: PairOrder) -> torch.Tensor:
    """Copy rows [T, H] to the places [T K, H] of their pairs."""
    return rows.index_select(0, order.pairs // order.places.shape[1])


def multiply(
    x: torch.Tensor, weight: torch.Tensor, order: PairOrder, from_rows: bool = False
) -> torch.Tensor:
    """Multiply each pair's row by its expert's matrix.

    Args:
        x: [T, in] with `from_rows`, else [T K, in] by place.
        weight: [E, in, out].
        order: The places.
        from_rows: Whether pairs take their row of `x`.

    Returns:
        [T K, out] by place.
    """
    if from_rows:
        x = spread_rows(x, order)
    return functional.grouped_mm(x, weight, offs=order.ends)


def sum_pairs(
    pairs: torch.Tensor, order: PairOrder, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum each row's pairs, column after column from 0, and round once.

    Args:
        pairs: [T K, H] by place.
        order: The places.
        weights: [T, K] f32 factors of the pairs; `None` is 1.

    Returns:
        [T, H] in the dtype of `pairs`, summed in float32 or wider.
    """
    wide = _wide(pairs)
    total = torch.zeros_like(pairs[: len(order.places)], dtype=wide)
    for column, places in enumerate(order.places.unbind(1)):
        part = pairs.index_select(0, places).to(wide)
        if weights is not None:
            part = weights[:, column, None].to(wide) * part
        total = total + part
    return total.to(pairs.dtype)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) up [T K, I] of [T K, 2 I], gate first, rounded once."""
    gate, up = gate_up.to(_wide(gate_up)).chunk(2, dim=1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def silu_and_mul_backward(
    gate_up: torch.Tensor,
    slope: torch.Tensor,
    weights: torch.Tensor,
    order: PairOrder,
    with_rows: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of pairs' weights and of `gate_up`.

    A row's output is sum_k w_k h_k W2 with h_k = silu(gate_k) up_k. So with
    g_k = (d loss / d output) W2^T: d loss / d w_k = <g_k, h_k>, and d loss / d h_k =
    w_k g_k. No pair's output is needed.

    Args:
        gate_up: [T K, 2 I] by place, gate first.
        slope: g [T K, I] by place.
        weights: w [T, K] f32.
        order: The places.
        with_rows: Whether the second result is wanted.

    Returns:
        [T, K] f32 or wider; [T K, 2 I] in the dtype of `gate_up`, or `None`.
    """
    wide = _wide(gate_up)
    gate, up = gate_up.to(wide).chunk(2, dim=1)
    share, slope = torch.sigmoid(gate), slope.to(wide)
    chosen = (silu_and_mul(gate_up).to(wide) * slope).sum(dim=1)
    grad_weights = chosen.index_select(0, order.places.reshape(-1))
    grad_weights = grad_weights.view(order.places.shape)
    if not with_rows:
        return grad_weights, None
    slope = weights.reshape(-1).index_select(0, order.pairs)[:, None].to(wide) * slope
    grad_gate = slope * up * share * (1 + gate * (1 - share))
    grad_up = slope * gate * share
    return grad_weights, torch.cat([grad_gate, grad_up], dim=1).to(gate_up.dtype)


def _wide(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


class PairWork(NamedTuple):
    """One implementation of the functions above."""

    order_pairs: Callable[..., PairOrder]
    multiply: Callable[..., torch.Tensor]
    sum_pairs: Callable[..., torch.Tensor]
    silu_and_mul: Callable[..., torch.Tensor]
    silu_and_mul_backward: Callable[..., tuple[torch.Tensor, torch.Tensor | None]]


PLAIN = PairWork(order_pairs, multiply, sum_pairs, silu_and_mul, silu_and_mul_backward)
