# SPDX-License-Identifier: Apache-2.0
"""Which rounds are due, whose turn it is, and which rows may be computed before."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

from moe_tta.plan_edit import PlanEdit
from moe_tta.rounds import RequestRounds
from moe_tta.vllm_plugin.round_orders import (
    Advance,
    Begin,
    End,
    Order,
    Revise,
)
from moe_tta.vllm_plugin.round_progress import Progress

TOO_LONG = "text too long"  # outcome of the round that is no more done


class RoundQueue:
    """The rounds of all requests of a scheduler, first due, first served.

    One job runs at a time, so that the adapter's memory is that of one. It does the
    first due round, and with it others that are due and ask for the same work. A round
    that the engine does itself, by probes, has its turn like any other: then `probing`,
    `pay` and `finish` are for the scheduler to ask, and the worker has no orders.

    Args:
        budget: Tokens of adapter work a step, on average.
        batch_tokens: Most rounds in one job, times its longest text; to that length
            attention pads each text.
    """

    def __init__(self, budget: int, batch_tokens: int = 0):
        self._budget, self._batch_tokens = budget, batch_tokens
        self._credit = 0
        self._of: dict[str, Progress] = {}
        self._due: deque[Progress] = deque()
        self._job: list[Progress] = []  # whose rounds the running job does
        self._unit = 0  # units done of it
        self._revised: list[Order] = []  # by rounds that probes did

    def __len__(self) -> int:
        return len(self._of)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._of

    def add(self, request: Any, rounds: RequestRounds) -> None:
        """Remember a request and its rounds."""
        self._of[request.request_id] = Progress(request, rounds)

    def remove(self, request_id: str) -> None:
        """Forget a request; the worker drops its job when told that it ended."""
        progress = self._of.pop(request_id, None)
        if progress is None or not progress.due:
            return
        self._due.remove(progress)
        if progress in self._job:
            self._job.remove(progress)
            self._unit = self._unit if self._job else 0

    def holds_back(self, request: Any) -> bool:
        """Whether a request that waits has rows among its known ones that must wait."""
        progress = self._of.get(request.request_id)
        awaited = None if progress is None else progress.awaited
        return awaited is not None and awaited < request.num_tokens

    def limit(self, request_id: str, first: int, count: int) -> int:
        """Return how many of `count` rows from position `first` may be computed.

        No row before its version is known, and rows of two versions at most, which is
        what bounds the plans of a step.
        """
        progress = self._of.get(request_id)
        if progress is None:
            return count
        end, awaited = first + count, progress.awaited
        if awaited is not None:
            end = min(end, max(awaited, first))
        inside = sorted({s for s in progress.starts if first < s < end})
        return (inside[1] if len(inside) > 1 else end) - first

    def note_handed(self) -> None:
        """Take in how many rows have been given to the worker by now."""
        for progress in self._of.values():
            computed = progress.request.num_computed_tokens
            progress.handed = max(progress.handed, computed)

    def orders(self, idle: bool) -> list[Order]:
        """Return what the worker shall do before the step.

        Args:
            idle: Whether the step computes no row: then the first unit in line is done
                whatever it costs.
        """
        self._collect_due()
        if self._due:
            self._credit += self._budget
        given, self._revised = self._revised, []
        while (turn := self._turn()) and not turn.rounds.work.probes:
            if not self.pay(idle):
                return given
            idle = False
            given += self._do_unit()
        if not self._due:
            self._credit = 0
        return given

    def pay(self, idle: bool) -> bool:
        """Take the next unit's cost from the budget; `False` where that is too little.

        Args:
            idle: See `orders`.
        """
        cost = self._cost()
        if cost > self._credit and not idle:
            return False
        self._credit = max(self._credit - cost, 0)
        self._unit += 1
        return True

    def probing(self) -> Begin | None:
        """Return the round in turn as one that begins, if it is done by probes."""
        self._collect_due()
        turn = self._turn()
        return self._begin() if turn and turn.rounds.work.probes else None

    def finish(self, edit: PlanEdit | None) -> int:
        """End the round in turn, which probes did, and return its version's start.

        Args:
            edit: What was found; `None` keeps the version before.
        """
        [progress] = self._job
        request_id, start = self._end(progress)
        self._job, self._unit = [], 0
        if edit is not None:
            prompt_len = progress.rounds.prompt_len
            self._revised.append(Revise(request_id, prompt_len, start, edit))
        return start

    def ended(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield requests whose text has just become too long, each with a report."""
        for request_id, progress in self._of.items():
            missed = None if progress.ended else progress.rounds.missed(progress.number)
            if missed is None or progress.request.num_tokens < missed.context:
                continue
            progress.ended = True
            yield (
                request_id,
                {
                    "service": progress.rounds.work.service,
                    "round": progress.number,
                    "context": missed.context,
                    "start": None,
                    "outcome": TOO_LONG,
                    "milliseconds": 0.0,
                },
            )

    def _collect_due(self) -> None:
        for progress in self._of.values():
            if progress.due or progress.next is None:
                continue
            if progress.request.num_tokens >= progress.next.context:
                progress.due = True
                self._due.append(progress)

    def _turn(self) -> Progress | None:
        if self._due and self._unit == 0:
            self._job = self._gather()
        return self._job[0] if self._due else None

    def _gather(self) -> list[Progress]:
        """Return whose rounds the next job does: first due, first served."""
        first, *others = self._due
        work, found, longest = first.rounds.work, [first], first.next.context
        for other in others if work.together else ():
            context = max(longest, other.next.context)
            fits = (len(found) + 1) * context <= self._batch_tokens
            if fits and other.rounds.work == work:
                found.append(other)
                longest = context
        return found

    def _cost(self) -> int:
        work = self._job[0].rounds.work
        return sum(work.cost(self._unit, p.next.context) for p in self._job)

    def _do_unit(self) -> Iterator[Order]:
        if self._unit == 1:
            yield self._begin()
        yield Advance()
        if self._unit < len(self._job[0].rounds.work.passes):
            return
        done, self._job, self._unit = self._job, [], 0
        for progress in done:
            yield self._end(progress)

    def _begin(self) -> Begin:
        work = self._job[0].rounds.work
        readers = tuple(progress.reader() for progress in self._job)
        return Begin(work.service, work.arguments, readers)

    def _end(self, progress: Progress) -> End:
        context, start = progress.next
        if start is None:
            start = max(progress.handed, context - 1)
        self._due.remove(progress)
        progress.starts.append(start)
        progress.number += 1
        progress.due = False
        return End(progress.request.request_id, start)
