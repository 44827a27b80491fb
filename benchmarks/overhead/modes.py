# SPDX-License-Identifier: Apache-2.0
"""The modes compared: which engine runs each, and what its requests carry."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from moe_tta.shape import RouterShape

STOCK, AGAIN = "stock", "stock-again"
ENGINE_OF = {
    STOCK: "stock",
    AGAIN: "stock",
    "idle": "plugin",
    "all-same": "plugin",
    "all-distinct": "plugin",
    "half-k": "plugin",
    "k-max": "wide",
}
MODES = tuple(mode for mode in ENGINE_OF if mode != AGAIN)
BIASED = 4  # experts with a bias in each layer


@dataclass(frozen=True)
class EngineKind:
    """One engine: the plugin's settings, or `None` where it is switched off."""

    name: str
    settings: dict[str, Any] | None

    @property
    def environment(self) -> dict[str, str]:
        """Variables that its process needs."""
        return {"MOE_TTA_DISABLE": "1" if self.settings is None else "0"}

    @property
    def additional_config(self) -> dict[str, Any]:
        """Value of vLLM's option of that name."""
        return {} if self.settings is None else {"moe_tta": self.settings}


def engine_kind(name: str, shape: RouterShape) -> EngineKind:
    """Return the engine called `name` in `ENGINE_OF`."""
    settings = {
        "stock": None,
        "plugin": {"allow_inline": True},
        "wide": {"allow_inline": True, "k_max": 2 * shape.top_k},
    }
    return EngineKind(name, settings[name])


def requests(
    mode: str, shape: RouterShape, count: int, serial: int
) -> list[dict[str, Any] | None]:
    """Return what each of `count` requests carries under `moe_tta`.

    Args:
        mode: One of `ENGINE_OF`.
        shape: The model's routers.
        count: Requests of the batch.
        serial: Number of the measurement: plans of another one are other plans, so
            that no slot holds them yet.
    """
    if mode == "all-same":
        return [edited(shape, f"{serial}")] * count
    if mode == "all-distinct":
        return [edited(shape, f"{serial}-{index}") for index in range(count)]
    if mode == "half-k":
        return [{"dynamic_k": {"k": max(1, shape.top_k // 2)}}] * count
    return [None] * count


def edited(shape: RouterShape, seed: str) -> dict[str, Any]:
    """Return a request that uses bias, promote, demote and top-p in every layer.

    With random weights the best experts hold less than half of the probability,
    so that top-p keeps the model's own number of them and the mode's time is the
    plugin's, not that of fewer or more experts.
    """
    rng = random.Random(seed)
    bias, promote, demote = [], [], []
    for layer in shape.layers:
        count = min(BIASED + 2, shape.num_experts)
        picked = rng.sample(range(shape.num_experts), count)
        promote.append([layer, picked[0]])
        demote.append([layer, picked[1]])
        bias += [[layer, e, round(rng.uniform(-1, 1), 4)] for e in picked[2:]]
    return {
        "steer": {"bias": bias, "promote": promote, "demote": demote},
        "dynamic_k": {"p": round(rng.uniform(0.9, 0.99), 6)},
    }
