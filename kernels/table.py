# SPDX-License-Identifier: Apache-2.0
"""The plan table: every slot's routing plan on the device, at fixed addresses."""

from __future__ import annotations

from enum import IntFlag
from typing import NamedTuple

import numpy as np
import torch

from moe_tta.plan import FIELDS, NUM_SELECT_ARGS, RoutingPlan, Select
from moe_tta.shape import RouterShape

# bits of `flags`
FORBIDDEN, PROMOTE, DEMOTE, DROP = 1, 2, 4, 8


class Features(IntFlag):
    """Optional parts of the row operations that a slot may use."""

    NONE = 0
    MASK = 1  # allow
    BIAS = 2
    PROMOTE = 4  # promote, demote
    TARGET = 8  # target, mix
    SELECT = 16  # select with its numbers
    SAMPLE = 32  # Select.SAMPLE somewhere
    WEIGHTS = 64  # scale, drop, renorm
    ALL = 127


class LayerTable(NamedTuple):
    """One layer's part of the plan table; S slots, E experts."""

    flags: torch.Tensor  # [S, E] uint8, bits FORBIDDEN, PROMOTE, DEMOTE, DROP
    bias: torch.Tensor  # [S, E] f32
    target: torch.Tensor  # [S, E] f32
    scale: torch.Tensor  # [S, E] f32
    mix: torch.Tensor  # [S] f32
    select: torch.Tensor  # [S] int32, Select
    k_min: torch.Tensor  # [S] int32
    k_max: torch.Tensor  # [S] int32
    renorm: torch.Tensor  # [S] int32, Renorm
    select_args: torch.Tensor  # [S, 3] f32
    seed: torch.Tensor  # [S] int64


class PlanTable:
    """The plans of `num_slots` slots; slot 0 is neutral forever.

    The tensors [slots + 1, L, ...] are made once and only ever written in place, so
    that captured graphs and compiled code keep reading them.

    Args:
        shape: The model's routers.
        num_slots: Slots that can be written, 1 to `num_slots`.
        device: Where the tensors live.
    """

    def __init__(self, shape: RouterShape, num_slots: int, device: torch.device | str):
        self.shape = shape
        self.num_slots = num_slots
        neutral = _slot_arrays(RoutingPlan(), shape)
        self._tensors = {
            name: torch.from_numpy(array)
            .expand(num_slots + 1, *array.shape)
            .clone()
            .to(device)
            for name, array in neutral.items()
        }
        self._features = [Features.NONE] * (num_slots + 1)
        self._layers = [
            LayerTable(**{name: t[:, index] for name, t in self._tensors.items()})
            for index in range(len(shape.layers))
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the table holds."""
        return sum(tensor.nbytes for tensor in self._tensors.values())

    def layer(self, index: int) -> LayerTable:
        """Return the views of one layer, by its position in `shape.layers`."""
        return self._layers[index]

    def features(self, slot: int) -> Features:
        """Return which optional parts the slot's plan uses, over all layers."""
        return self._features[slot]

    def write(self, slot: int, plan: RoutingPlan) -> None:
        """Overwrite all of a slot, in stream order and without waiting for the device.

        Args:
            slot: 1 to `num_slots`.
            plan: A plan that `validate` accepted.

        Raises:
            ValueError: the slot is 0 or out of range.
        """
        if not 1 <= slot <= self.num_slots:
            raise ValueError(f"slot {slot} cannot be written, 1..{self.num_slots} can")
        for name, array in _slot_arrays(plan, self.shape).items():
            tensor, source = self._tensors[name], torch.from_numpy(array)
            if tensor.is_cuda:
                source = source.pin_memory()
            tensor[slot].copy_(source, non_blocking=True)
        self._features[slot] = plan_features(plan)


def plan_features(plan: RoutingPlan) -> Features:
    """Return which optional parts of the row operations a plan uses."""

    def differs(*names: str) -> bool:
        return any(
            (value := getattr(plan, name)) is not None
            and bool((value != FIELDS[name][2]).any())
            for name in names
        )

    used = Features.NONE
    for feature, names in (
        (Features.MASK, ("allow",)),
        (Features.BIAS, ("bias",)),
        (Features.PROMOTE, ("promote", "demote")),
        (Features.TARGET, ("mix",)),
        (Features.SELECT, ("select",)),
        (Features.WEIGHTS, ("scale", "drop", "renorm")),
    ):
        if differs(*names):
            used |= feature
    if plan.select is not None and (plan.select == Select.SAMPLE).any():
        used |= Features.SAMPLE
    return used


def _slot_arrays(plan: RoutingPlan, shape: RouterShape) -> dict[str, np.ndarray]:
    """Return one slot's arrays [L, ...] by `LayerTable` field, neutral where unset."""
    num_layers, num_experts = len(shape.layers), shape.num_experts

    def full(name: str, sizes: tuple[int, ...]) -> np.ndarray:
        dtype, _, neutral = FIELDS[name]
        array = np.full(sizes, neutral, dtype)
        value = getattr(plan, name)
        if value is not None:
            array[...] = value
        return array

    def per_expert(name: str) -> np.ndarray:
        return full(name, (num_layers, num_experts))

    flags = (
        ~per_expert("allow") * np.uint8(FORBIDDEN)
        + per_expert("promote") * np.uint8(PROMOTE)
        + per_expert("demote") * np.uint8(DEMOTE)
        + per_expert("drop") * np.uint8(DROP)
    )
    arrays = {"flags": flags}
    for name in ("bias", "target", "scale"):
        arrays[name] = per_expert(name)
    for name in ("mix", "select", "k_min", "k_max", "renorm", "seed"):
        arrays[name] = full(name, (num_layers,))
    arrays["select_args"] = full("select_args", (num_layers, NUM_SELECT_ARGS))
    return arrays
