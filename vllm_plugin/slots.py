# SPDX-License-Identifier: Apache-2.0
"""Slots: where the plans of the running step live on the device."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from moe_tta.kernels.table import Features, PlanTable
from moe_tta.plan import RoutingPlan

# one for each segment: after preemption, one chunk may hold rows of all three
PLANS_PER_REQUEST = 3
# and of two versions: none starts before the prompt's last row, so that the second one
# adds a plan to three only where it starts among generated rows, which makes one more
PLANS_PER_VERSIONED_REQUEST = 4


class SlotTable:
    """Keeps plans in the plan table's slots, shared by fingerprint.

    A slot is pinned while a row of the current step uses it. Nothing else holds one:
    a finished, aborted or preempted request has no rows, so there is nothing to
    release and nothing to leak. Unpinned plans stay cached, oldest reused first.
    """

    def __init__(self, table: PlanTable, num_slots: int):
        self.table = table
        self.pinned: dict[str, int] = {}
        self._free = list(range(num_slots, 0, -1))
        self._cached: OrderedDict[str, int] = OrderedDict()

    def assign(self, plans: Mapping[str, bytes]) -> dict[str, int]:
        """Pin exactly these plans, by fingerprint, and return their slots.

        A step never needs more than `PLANS_PER_REQUEST` plans of each request (with
        rounds, `PLANS_PER_VERSIONED_REQUEST`), which is how many slots there are:
        capacity cannot run out.
        """
        for fingerprint in plans:
            if fingerprint in self._cached:
                self._cached.move_to_end(fingerprint)
        new = {}
        for fingerprint, data in plans.items():
            if fingerprint not in self._cached:
                slot = self._free.pop() if self._free else self._evict(plans)
                new[slot] = RoutingPlan.from_bytes(data)
                self._cached[fingerprint] = slot
        self.table.write(new)
        self.pinned = {fingerprint: self._cached[fingerprint] for fingerprint in plans}
        return self.pinned

    def _evict(self, needed: Mapping[str, bytes]) -> int:
        oldest = next(name for name in self._cached if name not in needed)
        return self._cached.pop(oldest)

    def features(self) -> Features:
        """Return what the pinned slots use, for the oracle to skip the rest."""
        used = Features(0)
        for features in {self.table.features(slot) for slot in self.pinned.values()}:
            used |= features
        return used
