# SPDX-License-Identifier: Apache-2.0
"""Rounds: when a running request's plan is computed anew, and how much work it is.

A round reads the request's first `context` tokens. What it finds is a new *version* of
the request's plan, which holds for the rows from position `start` on; keys and values
of rows before it stay. Rows are told by absolute position, so that whatever recomputes
them finds the same versions again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

Mode = Literal["wait", "overlap"]


@dataclass(frozen=True)
class Work:
    """What one round does, as the worker and the scheduler need to know it.

    Attributes:
        service: Name of what does it: of the worker's service, or of the job that asks
            the engine for losses.
        arguments: What that takes, plain types.
        passes: Of each unit of the work, how many forward passes over the context it
            costs. A unit is what is never interrupted.
        extra_tokens: Tokens that a pass reads beside the context.
        together: Whether rounds of the same work can be done as one batch.
        probes: Whether the engine itself does it, by requests of its own that score
            the context under candidate plans, and not the worker between its steps.
    """

    service: str
    arguments: Mapping[str, Any]
    passes: tuple[int, ...]
    extra_tokens: int = 0
    together: bool = False
    probes: bool = False

    def cost(self, unit: int, context: int) -> int:
        """Return a unit's cost in tokens read."""
        return self.passes[unit] * (context + self.extra_tokens)


class Round(NamedTuple):
    """One round of a request.

    `start` is the first row of its version, which waits for it; `None` is the first
    row that has not been computed when the round is done: nothing waits.
    """

    context: int
    start: int | None


@dataclass(frozen=True)
class Schedule:
    """When rounds take place.

    Attributes:
        every: New tokens between rounds; 0 is one round, on the prompt.
        mode: `wait` computes the context's last row only after the round; `overlap`
            goes on with the version before.
        replay: Contexts and starts of a recorded run, instead.
    """

    every: int
    mode: Mode = "wait"
    replay: tuple[tuple[int, int], ...] | None = None

    def round(self, number: int, prompt_len: int) -> Round | None:
        """Return a request's round by number, from 0; `None` where there is none.

        Args:
            number: Of the round.
            prompt_len: Where the request's prompt ends for its plans.
        """
        if self.replay is not None:
            return Round(*self.replay[number]) if number < len(self.replay) else None
        if number and not self.every:
            return None
        context = prompt_len + number * self.every
        return Round(context, context - 1 if self.mode == "wait" else None)


class AskedRounds(NamedTuple):
    """What a request asks for, before its prompt is known."""

    work: Work
    schedule: Schedule


@dataclass(frozen=True)
class RequestRounds:
    """All rounds of one request.

    Attributes:
        work: Of every round.
        schedule: When they take place.
        prompt_len: Where the prompt ends for the plans.
        max_context: No round reads more tokens than these.
    """

    work: Work
    schedule: Schedule
    prompt_len: int
    max_context: int

    def round(self, number: int) -> Round | None:
        """Return a round by number; `None` after the last."""
        found = self.schedule.round(number, self.prompt_len)
        return None if found is None or found.context > self.max_context else found

    def missed(self, number: int) -> Round | None:
        """Return a round that only its text's length rules out; `None` for others."""
        found = self.schedule.round(number, self.prompt_len)
        return None if found is None or found.context <= self.max_context else found

    @property
    def first_row(self) -> int:
        """The lowest position that a version may ever hold for."""
        if self.schedule.replay:
            return min(start for _, start in self.schedule.replay)
        return self.prompt_len - 1

    def to_wire(self) -> dict[str, Any]:
        """Return plain types that msgpack can carry to the engine."""
        return asdict(self)

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> RequestRounds:
        """Read what `to_wire` wrote."""
        work, schedule = dict(wire["work"]), dict(wire["schedule"])
        work["passes"] = tuple(work["passes"])
        if schedule["replay"] is not None:
            schedule["replay"] = tuple(tuple(pair) for pair in schedule["replay"])
        return RequestRounds(
            Work(**work), Schedule(**schedule), wire["prompt_len"], wire["max_context"]
        )
