# SPDX-License-Identifier: Apache-2.0
"""What the scheduler tells the worker to do for rounds, before a step's forward pass.

Orders travel on the step's `SchedulerOutput` and are obeyed one after another. The
scheduler knows what every unit of work costs, so it needs no answer to go on: after
`End` is sent, rows from its `start` on may be scheduled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from moe_tta.plan_edit import PlanEdit

ROUNDS = "moe_tta_rounds"  # key of a request's rounds in `extra_args`
ORDERS = "moe_tta_orders"  # attribute of a step's `SchedulerOutput`
REPORTS = "moe_tta_reports"  # attribute of a step's `ModelRunnerOutput`


class Reader(NamedTuple):
    """One request's round, and the text that it reads."""

    request_id: str
    number: int
    tokens: list[int]  # the round's context
    prompt_len: int  # where the request's prompt ends for its plans


class Begin(NamedTuple):
    """Start a job on the rounds of one request or more; no unit of it is done yet."""

    service: str
    arguments: Mapping[str, Any]
    readers: tuple[Reader, ...]


class Advance(NamedTuple):
    """Do the next unit of the job that was begun last."""


class End(NamedTuple):
    """The job is done: what it found holds for a request's rows from `start`."""

    request_id: str
    start: int


class Revise(NamedTuple):
    """A round that the engine did itself is done: its edit holds from `start` on."""

    request_id: str
    prompt_len: int  # where the request's prompt ends for its plans
    start: int
    edit: PlanEdit


Order = Begin | Advance | End | Revise
