# SPDX-License-Identifier: Apache-2.0
"""The worker's side of rounds: does as the scheduler orders, keeps what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.round_orders import Advance, Begin, End, Order
from moe_tta.vllm_plugin.rows import PlannedRequest
from moe_tta.vllm_plugin.services import Job, Result, Service
from moe_tta.vllm_plugin.versions import Version, VersionedRequest, unplanned

logger = compat.get_logger(__name__)


@dataclass
class _Running:
    """A round's job and what its report will say; `job` is `None` once it failed."""

    begun: Begin
    job: Job | None
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
        self.jobs: dict[str, _Running] = {}
        self._services, self._requests = services, requests
        self._reports: list[tuple[str, dict[str, Any]]] = []
        self._obey: dict[type, Callable[[Any], None]] = {
            Begin: self._begin,
            Advance: self._advance,
            End: self._end,
        }

    def obey(self, orders: Iterable[Order], finished: Iterable[str]) -> None:
        """Forget the jobs of finished requests, then do the step's orders."""
        for request_id in finished:
            self.jobs.pop(request_id, None)
        for order in orders:
            self._obey[type(order)](order)

    def take_reports(self) -> list[tuple[str, dict[str, Any]]]:
        """Return (request id, report) of the rounds that ended since the last call."""
        reports, self._reports = self._reports, []
        return reports

    def _begin(self, order: Begin) -> None:
        current = self._requests.get(order.request_id)
        edit = current.edit if isinstance(current, VersionedRequest) else None
        running = _Running(order, None)
        self.jobs[order.request_id] = running
        service = self._services[order.service]
        running.job = self._guarded(
            running, lambda: service.begin(order.tokens, order.arguments, edit)
        )

    def _advance(self, order: Advance) -> None:
        running = self.jobs[order.request_id]
        if running.job is not None:
            self._guarded(running, running.job.advance)

    def _end(self, order: End) -> None:
        running = self.jobs.pop(order.request_id)
        result = None
        if running.job is not None:
            result = self._guarded(running, running.job.result)
        if result is None:
            result = Result("failed", None, {})
        if result.edit is not None:
            version = Version(order.start, result.edit)
            self._add_version(order.request_id, running.begun.prompt_len, version)
        report = {
            "service": running.begun.service,
            "round": running.begun.number,
            "context": len(running.begun.tokens),
            "start": order.start,
            "outcome": result.outcome,
            "milliseconds": round(1e3 * running.seconds, 3),
            **result.facts,
        }
        self._reports.append((order.request_id, report))

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
                "moe-tta: round %d of request %s failed; it goes on as before",
                running.begun.number,
                running.begun.request_id,
            )
            running.job = None
            return None
        finally:
            running.seconds += time.perf_counter() - begun
