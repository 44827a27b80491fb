# SPDX-License-Identifier: Apache-2.0
"""The scheduler class that knows pairs: how they come and go, and stay unheard."""

from __future__ import annotations

import functools
from typing import Any

from vllm.v1.request import RequestStatus

from moe_tta.vllm_plugin.hidden import leave_out, leave_unsaid, take_outputs
from moe_tta.vllm_plugin.lockstep import Lockstep
from moe_tta.vllm_plugin.pair_metrics import PairCounts
from moe_tta.vllm_plugin.pairs import Ask, make_follower
from moe_tta.vllm_plugin.probe_scheduler import ProbeScheduler
from moe_tta.vllm_plugin.waking import Waking


@functools.cache
def paired(scheduler_cls: type) -> type:
    """Return a subclass of a vLLM scheduler class that knows pairs and rounds."""
    name = f"Pair{scheduler_cls.__name__}"
    kinds = (Waking, ProbeScheduler, PairLifecycle, Lockstep, scheduler_cls)
    return type(name, kinds, {"__module__": __name__, "vllms": scheduler_cls})


class PairLifecycle:
    """Followers begin and end with their leads; the outside hears of leads only."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._admitted_pairs = self._preempted_pairs = 0

    def follow_blocks(self) -> None:
        """Stand between vLLM and its cache manager, which counts hits by request."""
        super().follow_blocks()
        self._record = self.kv_cache_manager.record_prefix_cache_stats
        self.kv_cache_manager.record_prefix_cache_stats = self._record_prefix_cache

    def add_request(self, request: Any) -> None:
        """Add a request, and its follower if it asks for one."""
        ask = Ask.take(request)
        super().add_request(request)
        if ask is not None:
            follower = make_follower(request, ask)
            super().add_request(follower)
            self.pairs.add(request, follower)
            self._admitted_pairs += 1

    def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Any]:
        """Finish requests, leads with their followers; return the leads.

        A follower that is finished by itself fails its lead.
        """
        if request_ids is None:
            request_ids = list(self.requests)
        named = {request_ids} if isinstance(request_ids, str) else set(request_ids)
        for request_id in list(named):
            partner = self.pairs.other(request_id)
            if partner is None or partner.request_id in named:
                continue
            if self.pairs.follows(request_id):
                self.fail(partner, "its second stream was aborted")
            else:
                named.add(partner.request_id)
        done = super().finish_requests(named, finished_status)
        leads = [r for r in done if not self.pairs.follows(r.request_id)]
        for lead in leads:
            self.pairs.remove(lead.request_id)
        return leads

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
        """Take in a step's tokens; end followers with their leads."""
        followers = set(self.pairs)
        outputs = super().update_from_output(*args, **kwargs)
        take_outputs(outputs, followers)
        for follower_id in list(self.pairs):
            self._end_together(follower_id)
        return outputs

    def _end_together(self, follower_id: str) -> None:
        lead = self.pairs.other(follower_id)
        if lead.is_finished():
            super().finish_requests(follower_id, RequestStatus.FINISHED_ABORTED)
            self.pairs.remove(follower_id)
        elif follower_id not in self.requests:
            self.fail(lead, "its second stream ended early")

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        # a follower is preempted with its lead
        self._preempted_pairs += self.pairs.follows(request.request_id)

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = super()._free_request(request, *args, **kwargs)
        if self.pairs.follows(request.request_id):
            leave_unsaid(self, request)
        return result

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Return the step's statistics; vLLM's counts of requests mean leads.

        Pairs have counts of their own, once there has been one.
        """
        stats = super().make_stats(*args, **kwargs)
        if stats is None:
            return None
        running = leave_out(stats, self, self.pairs)
        if self._admitted_pairs:
            totals = self._admitted_pairs, self._preempted_pairs
            PairCounts(running, *totals).put(stats)
        return stats

    def _record_prefix_cache(self, request: Any, num_hits: int) -> None:
        if not self.pairs.follows(request.request_id):
            self._record(request, num_hits)
