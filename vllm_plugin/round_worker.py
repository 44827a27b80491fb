# SPDX-License-Identifier: Apache-2.0
"""The worker's side of rounds: does as the scheduler orders, keeps what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.round_orders import (
    Advance,
    Begin,
    End,
    Order,
    Reader,
    Revise,
)
from moe_tta.vllm_plugin.rows import PlannedRequest
from moe_tta.vllm_plugin.services import Job, Result, Service, Text, report
from moe_tta.vllm_plugin.versions import Version, VersionedRequest, unplanned

logger = compat.get_logger(__name__)


@dataclass
class _Running:
    """A job and what its reports will say; `job` is `None` once it failed.

    `waiting` are the readers, by request id, whose results nobody has taken.
    """

    begun: Begin
    job: Job | None
    waiting: dict[str, Reader]
    results: dict[str, Result] | None = None
    seconds: float = 0.0


class RoundWorker:
    """Runs jobs by orders, and gives requests their versions.

    Args:
        services: By `Work.service`.
        requests: The worker's requests by id, changed when one gets a version.
    """

    def __init__(
        self,
        services: Mapping[str, Service],
        requests: dict[str, PlannedRequest | VersionedRequest],
    ):
        self._running: _Running | None = None
        self._services, self._requests = services, requests
        self._reports: list[tuple[str, dict[str, Any]]] = []
        self._obey: dict[type, Callable[[Any], None]] = {
            Begin: self._begin,
            Advance: self._advance,
            End: self._end,
            Revise: self._revise,
        }

    @property
    def jobs(self) -> tuple[str, ...]:
        """The requests whose rounds are being done."""
        return () if self._running is None else tuple(self._running.waiting)

    def obey(self, orders: Iterable[Order], finished: Iterable[str]) -> None:
        """Forget the rounds of finished requests, then do the step's orders."""
        for request_id in finished:
            self._forget(request_id)
        for order in orders:
            self._obey[type(order)](order)

    def take_reports(self) -> list[tuple[str, dict[str, Any]]]:
        """Return (request id, report) of the rounds that ended since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def _forget(self, request_id: str) -> None:
        """Drop a reader; a job that nobody waits for is dropped with its memory."""
        running = self._running
        if running is None:
            return
        running.waiting.pop(request_id, None)
        if not running.waiting:
            self._running = None

    def _begin(self, order: Begin) -> None:
        texts = [
            Text(reader.tokens, self._edit(reader.request_id))
            for reader in order.readers
        ]
        readers = {reader.request_id: reader for reader in order.readers}
        running = self._running = _Running(order, None, readers)
        service = self._services[order.service]
        running.job = self._guarded(
            running, lambda: service.begin(texts, order.arguments)
        )

    def _edit(self, request_id: str) -> PlanEdit | None:
        current = self._requests.get(request_id)
        return current.edit if isinstance(current, VersionedRequest) else None

    def _advance(self, order: Advance) -> None:
        running = self._running
        if running.job is not None:
            self._guarded(running, running.job.advance)

    def _end(self, order: End) -> None:
        running = self._running
        reader = running.waiting[order.request_id]
        if running.results is None:
            running.results = self._take_results(running)
        result = running.results.get(order.request_id, Result("failed", None, {}))
        if result.edit is not None:
            version = Version(order.start, result.edit)
            self._add_version(order.request_id, reader.prompt_len, version)
        share = running.seconds / len(running.begun.readers)
        service = running.begun.service
        told = report(service, reader, order.start, result, share)
        self._reports.append((order.request_id, told))
        self._forget(order.request_id)

    def _take_results(self, running: _Running) -> dict[str, Result]:
        """Return the results by request id; none of a job that failed."""
        found = None
        if running.job is not None:
            found = self._guarded(running, running.job.results)
        names = (reader.request_id for reader in running.begun.readers)
        return {} if found is None else dict(zip(names, found, strict=True))

    def _revise(self, order: Revise) -> None:
        version = Version(order.start, order.edit)
        self._add_version(order.request_id, order.prompt_len, version)

    def _add_version(self, request_id: str, prompt_len: int, version: Version) -> None:
        current = self._requests.get(request_id)
        if not isinstance(current, VersionedRequest):
            current = VersionedRequest(current or unplanned(prompt_len))
            self._requests[request_id] = current
        current.add(version)

    def _guarded(self, running: _Running, work: Callable[[], Any]) -> Any:
        """Run a part of a job; whatever goes wrong ends the job and nothing else."""
        begun = time.perf_counter()
        try:
            return work()
        except Exception:
            logger.exception(
                "moe-tta: the round of %s failed; they go on as before",
                ", ".join(running.waiting),
            )
            running.job = None
            return None
        finally:
            running.seconds += time.perf_counter() - begun
