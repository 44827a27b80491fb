# SPDX-License-Identifier: Apache-2.0
"""Parameters of steer."""

from __future__ import annotations

import re
from collections import Counter
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, FailFast, Field, Strict
from pydantic_core import PydanticCustomError

from moe_tta.strategies.base import StrategyParams, items

MAX_BIAS = 1e4  # logits; far past any router's, far inside fp32
MAX_SCALE = 1e4
MAX_STRENGTH = 100.0

INLINE = ("promote", "demote", "allow", "bias", "scale", "drop")


def _no_repeats(entries: tuple[Any, ...]) -> tuple[Any, ...]:
    pairs = bool(entries) and isinstance(entries[0], tuple)
    keys = [entry[:2] for entry in entries] if pairs else entries
    if len(set(keys)) == len(keys):
        return entries
    key = next(key for key, times in Counter(keys).items() if times > 1)
    what = f"layer {key[0]} expert {key[1]}" if pairs else f"expert {key}"
    raise PydanticCustomError("repeated", "{what} is listed twice", {"what": what[:80]})


def layer_key(key: Any) -> Any:
    """Read a layer number that is the key of a JSON object, and so a string."""
    if isinstance(key, str) and re.fullmatch(r"0|[1-9][0-9]{0,8}", key, re.ASCII):
        return int(key)
    if isinstance(key, str):
        raise PydanticCustomError("layer_key", "expected a layer number as the key")
    return key


def _bounded(low: float, high: float) -> Any:
    return Annotated[float, Field(ge=low, le=high)]


Expert = Annotated[tuple[int, int], Strict(False), items("layer", "expert")]
Bias = Annotated[
    tuple[int, int, _bounded(-MAX_BIAS, MAX_BIAS)],
    Strict(False),
    items("layer", "expert", "value"),
]
Scale = Annotated[
    tuple[int, int, _bounded(0, MAX_SCALE)],
    Strict(False),
    items("layer", "expert", "factor"),
]
Unique = AfterValidator(_no_repeats)
Experts = Annotated[tuple[Expert, ...], Strict(False), FailFast(), Unique]
Biases = Annotated[tuple[Bias, ...], Strict(False), FailFast(), Unique]
Scales = Annotated[tuple[Scale, ...], Strict(False), FailFast(), Unique]
Numbers = Annotated[tuple[int, ...], Strict(False), FailFast(), Unique]
Layer = Annotated[int, BeforeValidator(layer_key)]


class SteerParams(StrategyParams):
    """Edits by (decoder layer, expert).

    Attributes:
        promote: Rank these above all others.
        demote: Rank these below all others.
        allow: Per layer, the only experts that may be chosen.
        bias: Added to the router logit, |value| <= `MAX_BIAS`.
        scale: Multiplies the weight of a chosen expert, 0 <= factor <= `MAX_SCALE`.
        drop: Zero the weight of a chosen expert; nothing takes its place.
        mask: Name of an artefact that holds such edits; inline edits are put on top.
        strength: 0..`MAX_STRENGTH`; multiplies bias and the distance of scale from 1.
            The other edits have no degree.
        layers: Limits the mask to these layers; inline edits must lie inside.
    """

    promote: Experts = ()
    demote: Experts = ()
    allow: dict[Layer, Numbers] = Field(default_factory=dict)
    bias: Biases = ()
    scale: Scales = ()
    drop: Experts = ()
    mask: str | None = None
    strength: _bounded(0, MAX_STRENGTH) | None = None

    def inline_edits(self) -> tuple[str, ...]:
        """Name the given members that edit experts without a registered artefact."""
        return tuple(name for name in INLINE if getattr(self, name))
