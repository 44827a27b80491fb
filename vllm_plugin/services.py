# SPDX-License-Identifier: Apache-2.0
"""The protocol of what does the work of rounds in a worker.

A service is named in `adapter_loading.SERVICES`, is made once, when the model has been
loaded, and makes a job for each round, or for several that go together.
The scheduler hands a job its units, in order and exactly as many as `Work.passes` has;
between two units other requests may be served. What a job may not do is keep anything
running between units, change the model, or let one request's result depend on another.
What it raises ends its rounds, not the engine: requests go on with the plan they had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin.round_orders import Reader


class Result(NamedTuple):
    """What a job found.

    Attributes:
        outcome: `adapted`, or why not, in a few words.
        edit: The change of the request's own plans; `None` keeps the version before.
        facts: What the report tells beside, plain types.
    """

    outcome: str
    edit: PlanEdit | None
    facts: dict[str, Any]


def report(
    service: str, reader: Reader, start: int, result: Result, seconds: float
) -> dict[str, Any]:
    """Return what a request is told of a round, plain types.

    Args:
        service: Of its work.
        reader: The round, and what it read.
        start: First row of its version.
        result: What was found.
        seconds: How long it took.
    """
    return {
        "service": service,
        "round": reader.number,
        "context": len(reader.tokens),
        "start": start,
        "outcome": result.outcome,
        "milliseconds": round(1e3 * seconds, 3),
        **result.facts,
    }


class Text(NamedTuple):
    """What a round reads of a request, and the edit in force of its last round."""

    tokens: Sequence[int]
    edit: PlanEdit | None


class Job(Protocol):
    """One round of one request, or of several."""

    def advance(self) -> None:
        """Do the next unit."""

    def results(self) -> Sequence[Result]:
        """Return what was found for each text, after the last unit."""


class Service(Protocol):
    """Makes the jobs of one strategy."""

    def begin(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> Job:
        """Return the job of a round.

        Args:
            texts: One of each request; more than one only where `Work.together`.
            arguments: The strategy's `Work.arguments`, the same for all.
        """
