# SPDX-License-Identifier: Apache-2.0
"""A mix-in for vLLM's scheduler: rounds that the engine does itself, by probes.

Probes stand before all requests that wait, and are else requests like others: they
share steps, blocks and places with them. The outside hears nothing of them. They end
when they are read, or with their owner.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping
from typing import Any

from vllm.v1.request import RequestStatus

from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin.hidden import leave_out, leave_unsaid, take_outputs
from moe_tta.vllm_plugin.model_shape import shape_from_config
from moe_tta.vllm_plugin.options import read_settings
from moe_tta.vllm_plugin.probes import ProbeRound, make_probe, token_scores
from moe_tta.vllm_plugin.round_orders import Begin
from moe_tta.vllm_plugin.round_scheduler import RoundScheduler, hide_blocks
from moe_tta.vllm_plugin.services import Text, report


class ProbeScheduler(RoundScheduler):
    """Sends the probes of the round in turn, and gives the round what they say."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        settings = read_settings(self.vllm_config)
        self._jobs: Mapping[str, Any] = {}
        if settings.adapter is not None:
            from moe_tta.vllm_plugin.probe_jobs import JOBS  # imports transformers

            self._jobs = JOBS
            config = self.vllm_config.model_config.hf_text_config
            self._shape = shape_from_config(config, settings.k_max)
        self._round: ProbeRound | None = None
        self._probes: set[str] = set()  # ids of those that have not ended
        self._numbers = itertools.count()
        self._edits: dict[str, PlanEdit] = {}  # in force, by owner
        self._idle = False  # whether the last step computed no row

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, with the probes that the budget allows."""
        if self.rounds:
            self._go_on()
        output = super().schedule(*args, **kwargs)
        self._idle = not output.total_num_scheduled_tokens
        # a step that preempts lets nobody in: the next one may
        if self._idle and not output.preempted_req_ids:
            self._make_room()
        return output

    def _go_on(self) -> None:
        """Do what can be done of the rounds in turn without waiting for a probe."""
        while not self._probes and (begin := self.rounds.probing()):
            if self._round is None:
                self._round = self._begin(begin)
            if self._round.result is not None:
                self._finish(self._round)
            elif self.rounds.pay(self._idle):
                self._send(self._round)
            else:
                return

    def _begin(self, begin: Begin) -> ProbeRound:
        [reader] = begin.readers
        text = Text(reader.tokens, self._edits.get(reader.request_id))
        job = self._jobs[begin.service](
            text, self._shape, reader.number, begin.arguments
        )
        return ProbeRound(begin.service, reader, job)

    def _send(self, asking: ProbeRound) -> None:
        owner = self.requests[asking.reader.request_id]
        probes = [
            make_probe(owner, asking.reader.tokens, edit, next(self._numbers))
            for edit in asking.wanted
        ]
        asking.sent(probe.request_id for probe in probes)
        for probe in probes:
            self._probes.add(probe.request_id)
            hide_blocks(probe, 0)
            self.add_request(probe)

    def _finish(self, done: ProbeRound) -> None:
        self._round, request_id = None, done.reader.request_id
        edit = done.result.edit
        start = self.rounds.finish(edit)
        if edit is not None:
            self._edits[request_id] = edit
        told = report(done.service, done.reader, start, done.result, done.seconds)
        self._reports[request_id].append(told)

    def _enqueue_waiting_request(self, request: Any) -> None:
        if request.request_id in self._probes:
            # vLLM's queue before all others, which it drains when paused, too
            self.kv_holding_waiting.add_request(request)
        else:
            super()._enqueue_waiting_request(request)

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        if request.request_id in self._probes:
            self.waiting.remove_request(request)
            self.kv_holding_waiting.prepend_request(request)

    def _make_room(self) -> None:
        """Preempt one of those that wait for rounds, if nothing else can run.

        They hold blocks and places that a probe may lack, and wait for that probe.
        """
        probes = (self.requests.get(probe_id) for probe_id in self._probes)
        stuck = any(p and p.status != RequestStatus.RUNNING for p in probes)
        flying = any(request.num_in_flight_tokens for request in self.running)
        if not stuck or flying or not self.has_unfinished_requests():  # none if paused
            return
        for request in reversed(self.running):
            if request.request_id in self.rounds:
                self.running.remove(request)
                self._preempt_request(request, time.monotonic())
                return

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, Any]:
        """Take in a step's tokens, and what it says of probes."""
        probes = set(self._probes)
        outputs = super().update_from_output(*args, **kwargs)
        if not probes:
            return outputs
        said = take_outputs(outputs, probes)
        for probe_id in probes - self.requests.keys():
            self._probes.discard(probe_id)
            if self._round is not None and probe_id in self._round.waits:
                self._round.take(probe_id, token_scores(said.get(probe_id)))
        self._end_orphans()
        return outputs

    def finish_requests(self, request_ids: Any, finished_status: Any) -> list[Any]:
        """Finish requests, owners with their probes; return those not hidden."""
        probes = set(self._probes)
        done = super().finish_requests(request_ids, finished_status)
        self._end_orphans()
        return [request for request in done if request.request_id not in probes]

    def _end_orphans(self) -> None:
        """End the probes that no round waits for."""
        orphans = self._probes - (self._round.waits if self._round else set())
        if orphans:
            super().finish_requests(orphans, RequestStatus.FINISHED_ABORTED)
            self._probes -= orphans

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        request_id = request.request_id
        hidden = request_id in self._probes
        if hidden:  # nobody reads its blocks: let them be the first to be used again
            for ids in self.kv_cache_manager.get_block_ids(request_id):
                self.kv_cache_manager.evict_blocks(set(ids))
        result = super()._free_request(request, *args, **kwargs)
        if hidden:
            leave_unsaid(self, request)
        self._edits.pop(request_id, None)
        if self._round is not None and self._round.reader.request_id == request_id:
            self._round = None
        return result

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        """Return the step's statistics, in which probes are no requests."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            leave_out(stats, self, self._probes)
        return stats
