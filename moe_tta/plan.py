# SPDX-License-Identifier: Apache-2.0
"""The routing plan: what one request may say about routing, as plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np
from safetensors.numpy import load, save

from moe_tta.shape import RouterShape

FORMAT = 1  # part of every fingerprint: bump when a field changes its meaning


class Select(IntEnum):
    """How many experts, and which, of the ranked ones a row uses.

    The numbers in brackets are `select_args`; `k_min` and `k_max` bound every count.
    """

    MODEL = 0  # the model's own top_k
    TOP_K = 1  # the first k_max
    TOP_P = 2  # [p] until the running mass exceeds p, the crossing expert included
    RELATIVE = 3  # [beta] while score >= beta * best score (NAEE)
    ABSOLUTE = 4  # [tau] while score >= tau (MoDES with tau / alpha_l)
    ENTROPY = 5  # [low, high] normalised entropy mapped linearly on k_min..k_max
    RANKS = 6  # [first] ranks first .. first + k_max - 1, 0-based (SCMoE weak row)
    SAMPLE = 7  # [keep, pool, tau] keep the first, Gumbel-draw the rest of k_max


class Renorm(IntEnum):
    """Whether chosen weights are divided by their sum."""

    MODEL = 0
    ALWAYS = 1
    NEVER = 2


# field -> (dtype, per-expert?, neutral value); the order is the order of operations
FIELDS: dict[str, tuple[type, bool, float]] = {
    "allow": (np.bool_, True, True),
    "bias": (np.float32, True, 0.0),
    "promote": (np.bool_, True, False),
    "demote": (np.bool_, True, False),
    "target": (np.float32, True, 0.0),
    "mix": (np.float32, False, 0.0),
    "memory": (np.int32, False, 0),
    "neighbours": (np.int32, False, 0),
    "select": (np.int32, False, int(Select.MODEL)),  # numpy is slow with enums
    "k_min": (np.int32, False, 1),
    "k_max": (np.int32, False, 0),
    "select_args": (np.float32, False, 0.0),
    "seed": (np.int64, False, 0),
    "scale": (np.float32, True, 1.0),
    "drop": (np.bool_, True, False),
    "renorm": (np.int32, False, int(Renorm.MODEL)),
}
SELECT_FIELDS = ("select", "k_min", "k_max", "select_args", "seed")
# what says nothing without the field it belongs to
_ONLY_NUMBERS = ("target", "neighbours", *SELECT_FIELDS[1:])
NUM_SELECT_ARGS = 3
MAX_RECALLED = 64  # most neighbours of one row


class PlanError(ValueError):
    """A plan that this model's routers cannot honour; the message says why."""


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """One way to route every layer of a model; `None` is the neutral field.

    Shapes, with L = len(shape.layers) and E = shape.num_experts: per-expert fields
    [L, E], per-layer fields [L], `select_args` [L, 3]. Operations apply in the order
    the fields stand in. `target` [L, E] is a distribution over experts, blended as
    `(1 - mix) * p + mix * target`; `memory` instead names the token memory, by its
    place in the engine from 1, in which each row looks up its own target and mix among
    `neighbours` tokens. `seed` feeds `Select.SAMPLE` only.
    """

    allow: np.ndarray | None = None
    bias: np.ndarray | None = None
    promote: np.ndarray | None = None
    demote: np.ndarray | None = None
    target: np.ndarray | None = None
    mix: np.ndarray | None = None
    memory: np.ndarray | None = None
    neighbours: np.ndarray | None = None
    select: np.ndarray | None = None
    k_min: np.ndarray | None = None
    k_max: np.ndarray | None = None
    select_args: np.ndarray | None = None
    seed: np.ndarray | None = None
    scale: np.ndarray | None = None
    drop: np.ndarray | None = None
    renorm: np.ndarray | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the non-neutral fields by name."""
        return {
            name: value for name in FIELDS if (value := getattr(self, name)) is not None
        }

    @property
    def neutral(self) -> bool:
        """Whether this plan is the model's own rule."""
        return not self.arrays()

    @cached_property
    def fingerprint(self) -> str:
        """Hex digest of the plan's meaning; equal plans share a slot and KV."""
        digest = hashlib.sha256(f"moe-tta plan {FORMAT}".encode())
        for name, value in sorted(self.arrays().items()):
            digest.update(f"|{name}{value.dtype.str}{value.shape}|".encode())
            digest.update(np.ascontiguousarray(value).tobytes())
        return digest.hexdigest()

    def edited_layers(self) -> np.ndarray:
        """Return a bool mask of the layers in which some row may change.

        Shape [L]; [0] for a neutral plan, which does not know its L.
        """
        masks = [
            (value != FIELDS[name][2]).reshape(len(value), -1).any(axis=1)
            for name, value in self.arrays().items()
            if name not in _ONLY_NUMBERS
        ]
        return np.logical_or.reduce(masks) if masks else np.zeros(0, bool)

    def normalised(self) -> RoutingPlan:
        """Return the plan with exact dtypes and fields of neutral values dropped."""
        kept: dict[str, np.ndarray | None] = {}
        for name, value in self.arrays().items():
            dtype, _, neutral = FIELDS[name]
            array = np.ascontiguousarray(value, dtype=dtype)
            kept[name] = array if (array != neutral).any() else None
        if kept.get("mix") is None:
            kept["target"] = kept["mix"] = None
        if kept.get("memory") is None:
            kept["neighbours"] = None
        if kept.get("select") is None:
            kept.update(dict.fromkeys(SELECT_FIELDS))
        else:
            # a rule needs its bounds and numbers even where they are all neutral
            for name in ("k_max", "select_args"):
                if (value := getattr(self, name)) is not None:
                    kept[name] = np.ascontiguousarray(value, FIELDS[name][0])
        return RoutingPlan(**kept)

    def to_bytes(self) -> bytes:
        """Serialise as safetensors."""
        # safetensors writes the raw buffer, whatever the array's strides
        return save({n: np.ascontiguousarray(a) for n, a in self.arrays().items()})

    @staticmethod
    def from_bytes(data: bytes) -> RoutingPlan:
        """Read what `to_bytes` wrote."""
        return RoutingPlan(**load(data))

    def validate(self, shape: RouterShape) -> None:
        """Check arrays and meaning against a model.

        Raises:
            PlanError: shapes differ, values are not finite, or the routers cannot
                honour the plan; the message says what was expected and got.
        """
        from moe_tta.plan_checks import check_plan

        check_plan(self, shape)


def merge(plans: Sequence[RoutingPlan]) -> RoutingPlan:
    """Combine plans that edit different fields into one.

    Raises:
        PlanError: two plans set the same field.
    """
    merged: dict[str, np.ndarray] = {}
    for plan in plans:
        arrays = plan.arrays()
        clash = merged.keys() & arrays.keys()
        if clash:
            raise PlanError(f"two strategies both set {', '.join(sorted(clash))}")
        merged.update(arrays)
    return RoutingPlan(**merged)
