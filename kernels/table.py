# SPDX-License-Identifier: Apache-2.0
"""The plan table: every slot's routing plan on the device, at fixed addresses."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from enum import IntFlag
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_tta.plan import FIELDS, NUM_SELECT_ARGS, RoutingPlan, Select
from moe_tta.shape import RouterShape

# bits of `flags`
FORBIDDEN, PROMOTE, DEMOTE, DROP = 1, 2, 4, 8
_INTEGERS = ("select", "k_min", "k_max", "renorm", "memory", "neighbours")
_TORCH = {
    np.uint8: torch.uint8,
    np.int32: torch.int32,
    np.int64: torch.int64,
    np.float32: torch.float32,
}
_NUMPY = {dtype: dtype for dtype in _TORCH}


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
    RECALL = 128  # memory, neighbours
    ALL = 255


class LayerTable(NamedTuple):
    """One layer's part of the plan table; S slots, E experts.

    `packed` holds all of it, laid out as `Layout` says; the others are views of it.
    """

    flags: torch.Tensor  # [S, E] uint8, bits FORBIDDEN, PROMOTE, DEMOTE, DROP
    bias: torch.Tensor  # [S, E] f32
    target: torch.Tensor  # [S, E] f32
    scale: torch.Tensor  # [S, E] f32
    mix: torch.Tensor  # [S] f32
    select: torch.Tensor  # [S] int32, Select
    k_min: torch.Tensor  # [S] int32
    k_max: torch.Tensor  # [S] int32
    renorm: torch.Tensor  # [S] int32, Renorm
    memory: torch.Tensor  # [S] int32, place of a token memory from 1, or 0
    neighbours: torch.Tensor  # [S] int32
    select_args: torch.Tensor  # [S, 3] f32
    seed: torch.Tensor  # [S] int64
    packed: torch.Tensor  # [S, Layout.num_bytes] uint8, rows at multiples of 16 bytes


class Layout(NamedTuple):
    """Where each field of one slot's layer lies, in bytes from its start."""

    offsets: dict[str, int]
    num_bytes: int

    @staticmethod
    @functools.cache
    def of(num_experts: int) -> Layout:
        """Return the layout for a number of experts: numbers, `bias`, other arrays."""
        offsets, end = {}, 0
        for name, (dtype, sizes) in _fields(num_experts).items():
            end = _round_up(end) if name == "bias" else end  # aligned wide loads
            offsets[name] = end
            end += np.dtype(dtype).itemsize * math.prod(sizes)
        return Layout(offsets, _round_up(end))


def _fields(num_experts: int) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Return dtype and sizes by field, the widest dtype first, for alignment."""
    per_expert = (num_experts,)
    return {
        "seed": (np.int64, ()),
        "mix": (np.float32, ()),
        **dict.fromkeys(_INTEGERS, (np.int32, ())),
        "select_args": (np.float32, (NUM_SELECT_ARGS,)),
        **dict.fromkeys(("bias", "target", "scale"), (np.float32, per_expert)),
        "flags": (np.uint8, per_expert),
    }


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


class PlanTable:
    """The plans of `num_slots` slots; slot 0 is neutral forever.

    One tensor [slots + 1, L, Layout.num_bytes] is made once and only ever written in
    place, so that captured graphs and compiled code keep reading it.

    Args:
        shape: The model's routers.
        num_slots: Slots that can be written, 1 to `num_slots`.
        device: Where the tensor lives.
    """

    def __init__(self, shape: RouterShape, num_slots: int, device: torch.device | str):
        self.shape = shape
        self.num_slots = num_slots
        self._neutral = _pack_neutral(shape)
        neutral = torch.from_numpy(self._neutral)
        self._packed = neutral.repeat(num_slots + 1, 1, 1).to(device)
        self._features = [Features.NONE] * (num_slots + 1)
        self._layers = [
            _view(self._packed[:, index], shape.num_experts)
            for index in range(len(shape.layers))
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of device memory that the table holds."""
        return self._packed.nbytes

    def layer(self, index: int) -> LayerTable:
        """Return the views of one layer, by its position in `shape.layers`."""
        return self._layers[index]

    def features(self, slot: int) -> Features:
        """Return which optional parts the slot's plan uses, over all layers."""
        return self._features[slot]

    def write(self, plans: Mapping[int, RoutingPlan]) -> None:
        """Overwrite slots, in stream order and without waiting for the device.

        Args:
            plans: Plans that `validate` accepted, by slot, 1 to `num_slots`.

        Raises:
            ValueError: a slot is 0 or out of range.
        """
        for slot in plans:
            if not 1 <= slot <= self.num_slots:
                raise ValueError(
                    f"slot {slot} cannot be written, 1..{self.num_slots} can"
                )
        if not plans:
            return
        packed = np.broadcast_to(self._neutral, (len(plans), *self._neutral.shape))
        packed = packed.copy()
        _pack(list(plans.values()), packed, self.shape.num_experts)
        source = torch.from_numpy(packed)
        if self._packed.is_cuda:
            source = source.pin_memory()  # once for all: the first time is slow
        for row, slots in _rising(list(plans)):
            part = source[row : row + len(slots)]
            self._packed[slots.start : slots.stop].copy_(part, non_blocking=True)
        for slot, plan in plans.items():
            self._features[slot] = plan_features(plan)


def _view(packed: torch.Tensor, num_experts: int) -> LayerTable:
    """Return the fields of `packed` [S, bytes] as typed views."""
    return LayerTable(**_unpacked(packed, num_experts, _TORCH), packed=packed)


_FEATURE_OF = {
    "allow": Features.MASK,
    "bias": Features.BIAS,
    **dict.fromkeys(("promote", "demote"), Features.PROMOTE),
    "mix": Features.TARGET,
    "select": Features.SELECT,
    **dict.fromkeys(("scale", "drop", "renorm"), Features.WEIGHTS),
    "memory": Features.RECALL,
}
# plain integers: an IntFlag takes a microsecond for every `|`
_BIT_OF = {name: feature.value for name, feature in _FEATURE_OF.items()}


def plan_features(plan: RoutingPlan) -> Features:
    """Return which optional parts of the row operations a plan uses.

    A field that is set counts: `RoutingPlan.normalised` leaves no neutral ones.
    """
    used = 0
    for name, bit in _BIT_OF.items():
        if getattr(plan, name) is not None:
            used |= bit
    if plan.select is not None and (plan.select == Select.SAMPLE).any():
        used |= Features.SAMPLE.value
    return Features(used)


def _pack_neutral(shape: RouterShape) -> np.ndarray:
    """Return the bytes [L, Layout.num_bytes] of a slot that changes nothing."""
    num_bytes = Layout.of(shape.num_experts).num_bytes
    packed = np.zeros((len(shape.layers), num_bytes), np.uint8)
    for name, values in _unpacked(packed, shape.num_experts).items():
        if name != "flags":
            values[...] = FIELDS[name][2]
    return packed


def _pack(plans: Sequence[RoutingPlan], packed: np.ndarray, num_experts: int) -> None:
    """Write what plans set into neutral slots [N, L, Layout.num_bytes]."""
    fields = _unpacked(packed, num_experts)
    flags = fields.pop("flags")
    for row, plan in enumerate(plans):
        for name, values in fields.items():
            if (value := getattr(plan, name)) is not None:
                values[row] = value
        for name, bit in (("promote", PROMOTE), ("demote", DEMOTE), ("drop", DROP)):
            if (value := getattr(plan, name)) is not None:
                flags[row] |= value * np.uint8(bit)
        if plan.allow is not None:
            flags[row] |= ~plan.allow * np.uint8(FORBIDDEN)


def _unpacked(packed: Any, num_experts: int, types: Mapping = _NUMPY) -> dict[str, Any]:
    """Return views by field of an array or tensor [..., Layout.num_bytes].

    Args:
        packed: Bytes.
        num_experts: E of its layout.
        types: The views' dtypes by NumPy's.
    """
    offsets = Layout.of(num_experts).offsets
    views = {}
    for name, (dtype, sizes) in _fields(num_experts).items():
        end = offsets[name] + np.dtype(dtype).itemsize * math.prod(sizes)
        typed = packed[..., offsets[name] : end].view(types[dtype])
        views[name] = typed if sizes else typed[..., 0]
    return views


def _rising(slots: Sequence[int]) -> Iterator[tuple[int, range]]:
    """Yield each run of slots that follow each other: its place, and the slots."""
    begin = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            yield begin, range(slots[begin], slots[end - 1] + 1)
            begin = end
