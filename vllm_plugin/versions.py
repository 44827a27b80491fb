# SPDX-License-Identifier: Apache-2.0
"""Requests whose plan has versions: which of them a row obeys, by its position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from moe_tta.plan import RoutingPlan
from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin.rows import PlannedRequest


class Version(NamedTuple):
    """What holds for a request's rows from a position on."""

    start: int
    edit: PlanEdit


class VersionedRequest:
    """A request's own plans up to its first version, and each version from its start.

    All of them are kept as long as the request: rows that are computed again obey the
    version they obeyed before.

    Args:
        own: The request as it came.
        versions: In the order in which they were made; starts never fall.
    """

    def __init__(self, own: PlannedRequest, versions: Sequence[Version] = ()):
        self.plans: dict[str, bytes] = dict(own.plans)
        self._own = own
        self._versions: list[Version] = []
        self._parts: list[PlannedRequest] = [own]
        for version in versions:
            self.add(version)

    @property
    def prompt_len(self) -> int:
        """Where the prompt ends for the plans."""
        return self._own.prompt_len

    @property
    def edit(self) -> PlanEdit | None:
        """The edit of the last version; `None` before the first."""
        return self._versions[-1].edit if self._versions else None

    def add(self, version: Version) -> None:
        """Let a version hold from its start on."""
        part = _edited(self._own, version.edit)
        self._versions.append(version)
        self._parts.append(part)
        self.plans.update(part.plans)

    def with_own(self, own: PlannedRequest) -> VersionedRequest:
        """Return the same versions of other plans."""
        return VersionedRequest(own, self._versions)

    def runs(self, start: int, count: int) -> Iterator[tuple[int, int, str]]:
        """Yield (first, end, fingerprint), as `PlannedRequest.runs` does."""
        end = start + count
        edges = [0, *(version.start for version in self._versions), end]
        for part, (low, high) in zip(self._parts, pairwise(edges), strict=True):
            low, high = max(low, start), min(high, end)
            if low < high:
                for first, last, name in part.runs(low, high - low):
                    yield low - start + first, low - start + last, name


def unplanned(prompt_len: int) -> PlannedRequest:
    """Return a request that leaves every row to the model."""
    return PlannedRequest(prompt_len, (None, None, None), {})


def _edited(own: PlannedRequest, edit: PlanEdit) -> PlannedRequest:
    segments: list[str | None] = []
    plans: dict[str, bytes] = {}
    for place, mark in enumerate(own.segments):
        before = None if mark is None else RoutingPlan.from_bytes(own.plans[mark])
        plan = edit.applied(before, place)
        segments.append(None if plan is None else plan.fingerprint)
        if plan is not None:
            plans[plan.fingerprint] = plan.to_bytes()
    return PlannedRequest(own.prompt_len, tuple(segments), plans)


Requests = Mapping[str, PlannedRequest | VersionedRequest]
