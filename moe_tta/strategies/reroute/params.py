# SPDX-License-Identifier: Apache-2.0
"""Parameters of reroute."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Strict, model_validator
from pydantic_core import PydanticCustomError

from moe_tta.strategies.rounds import MAX_TOKENS, RoundParams

MAX_STEPS = 64
MAX_CLIP = 10.0
CHOOSING = ("choice", "share", "sign")


class RerouteParams(RoundParams):
    """Add vectors to the router logits that make the text so far likelier.

    Source: Rewiring Experts on the Fly, arXiv 2510.14853: `steps`, `lr` and `every`
    are the paper's. Optimiser, share, hard or soft, clip and `skip` are unconfirmed
    there: these defaults are ours.

    Attributes:
        steps: Of each round, 1..`MAX_STEPS`.
        lr: Learning rate, in logits a step for Adam; 0 changes nothing.
        optimizer: `adam`, `sgd`, or `spsa`, which estimates gradients from losses that
            the engine itself takes: for any model, also cut or quantised.
        choice: `hard` adapts a share of the layers, `soft` all of them by weight.
        share: Of the layers, for `hard`; more than 0, at most 1.
        sign: 1 prefers layers whose routers are unsure, -1 those that are sure.
        layers: Decoder layers to adapt instead of a choice. With `spsa`, which sees
            no router, there is no choice: these, or all.
        clip: Largest |entry| of the vectors, in logits, up to `MAX_CLIP`.
        skip: Tokens at the head of the text that are context only.
    """

    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] = 5
    lr: Annotated[float, Field(ge=0, le=10)] = 0.05
    optimizer: Literal["adam", "sgd", "spsa"] = "adam"
    choice: Literal["hard", "soft"] = "hard"
    share: Annotated[float, Field(gt=0, le=1)] = 0.5
    sign: Literal[1, -1] = 1
    layers: (
        Annotated[tuple[int, ...], Strict(False), Field(min_length=1, max_length=1024)]
        | None
    ) = None
    clip: Annotated[float, Field(gt=0, le=MAX_CLIP)] = 1.0
    skip: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 0

    @model_validator(mode="after")
    def _one_choice(self) -> RerouteParams:
        for name in CHOOSING:
            if self.layers is not None and name in self.model_fields_set:
                raise PydanticCustomError(
                    "together", "expected {name} or layers, not both", {"name": name}
                )
            if self.optimizer == "spsa" and name in self.model_fields_set:
                raise PydanticCustomError(
                    "together",
                    "expected {name} or optimizer 'spsa', not both: it adapts all MoE "
                    "layers, or those named in layers",
                    {"name": name},
                )
        return self
