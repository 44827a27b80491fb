# SPDX-License-Identifier: Apache-2.0
"""The contract of strategies whose plan is computed while a request runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from moe_tta.rounds import Mode, Schedule, Work
from moe_tta.strategies.base import PlanContext, items

MIN_EVERY = 8  # a version of a plan is kept for each round until the request ends
MAX_REPLAY = 1024
MAX_TOKENS = 1 << 30  # of any text; numbers stay within what the engine can carry

Position = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
ReplayedRound = Annotated[
    tuple[Position, Position], Strict(False), items("context", "start")
]


class RoundParams(BaseModel):
    """What every such strategy takes: when its rounds take place.

    Attributes:
        every: New tokens between rounds, 0 or at least `MIN_EVERY`; 0 is one round, on
            the prompt.
        mode: `wait` computes the last known token's row only when the round is done;
            `overlap` goes on meanwhile, so that timing decides where it takes effect.
        replay: Contexts and starts that a run reported, to have the same run again.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False
    )

    every: Annotated[int, Field(ge=0, le=MAX_TOKENS)] = 128
    mode: Mode = "wait"
    replay: (
        Annotated[
            tuple[ReplayedRound, ...],
            Strict(False),
            Field(min_length=1, max_length=MAX_REPLAY),
        ]
        | None
    ) = None

    @field_validator("every")
    @classmethod
    def _not_too_often(cls, every: int) -> int:
        if 0 < every < MIN_EVERY:
            raise PydanticCustomError(
                "every", "expected 0 or at least {least}", {"least": MIN_EVERY}
            )
        return every

    @field_validator("replay")
    @classmethod
    def _could_have_been(
        cls, replay: Sequence[tuple[int, int]] | None
    ) -> Sequence[tuple[int, int]] | None:
        before = (0, 0)
        for context, start in replay or ():
            if context <= before[0] or start < before[1] or start < context - 1:
                raise PydanticCustomError(
                    "replay",
                    "expected growing contexts and starts, each start at least its "
                    "context - 1",
                )
            before = context, start
        return replay

    @model_validator(mode="after")
    def _one_schedule(self) -> RoundParams:
        for name in ("every", "mode"):
            if self.replay is not None and name in self.model_fields_set:
                raise PydanticCustomError(
                    "together", "expected {name} or replay, not both", {"name": name}
                )
        return self

    @property
    def schedule(self) -> Schedule:
        """When the rounds take place."""
        return Schedule(self.every, self.mode, self.replay)


@dataclass(frozen=True)
class RoundStrategy:
    """A family whose plan is made from the request's own text, in rounds.

    Attributes:
        name: Its member in the request object.
        params: Its parameters, checked without a model.
        work: Says what a round does. Raises `RequestError` with a path relative to the
            strategy's member for what the model cannot honour: in the worker it would
            be too late.
    """

    name: str
    params: type[RoundParams]
    work: Callable[[Any, PlanContext], Work]
