# SPDX-License-Identifier: Apache-2.0
"""Lockstep: a mix-in that makes vLLM's scheduler run pairs of requests as one.

Two requests of a pair have the same tokens. They may read the prompt at their own pace,
but sample in the same step only: while one is behind, the other waits one token short
of its end. They enter and leave the running list together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from vllm.v1.request import RequestStatus

from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.pairs import PairTable

logger = compat.get_logger(__name__)


class Lockstep:
    """How many tokens each request of a pair gets in a step.

    vLLM asks `_reserve_prefill_lookahead` for the last word on a request's tokens, and
    then the KV cache manager for blocks: no request is ever given tokens that it must
    give back, so that no block is filed in the prefix cache without being computed.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pairs = PairTable()
        # of the running step: tokens by request, the requests that sample beside
        # their partner, and those left behind by a preempted partner
        self._taken: dict[str, int] = {}
        self._sampling: set[str] = set()
        self._left_behind: list[Any] = []

    def follow_blocks(self) -> None:
        """Stand between vLLM and its cache manager, which gives blocks to requests."""
        self._allocate = self.kv_cache_manager.allocate_slots
        self.kv_cache_manager.allocate_slots = self._allocate_slots

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step."""
        self._taken.clear()
        self._sampling.clear()
        self._left_behind.clear()
        return super().schedule(*args, **kwargs)

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        """Let no request of a pair in while its partner could not follow."""
        ready = super()._handle_blocked_waiting_request(request)
        partner = self.pairs.other(request.request_id)
        if not ready or partner is None:
            return ready
        # tokens of a preempted request may still be on their way from the worker
        return not self._is_blocked_waiting_status(partner.status) and not any(
            r.num_stale_output_tokens and not r.drop_stale_output
            for r in (request, partner)
        )

    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        """Leave two tokens to compute: one to wait with, one to sample from."""
        blocks, hit, *rest = super()._get_local_prefix_cache_hit(request)
        if self.pairs.other(request.request_id) is not None:
            longest = (request.num_tokens - 2) // self.block_size * self.block_size
            if hit > longest:
                hit = longest
                blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, hit)
        return (blocks, hit, *rest)

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        count = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        partner = self.pairs.other(request.request_id)
        if partner is None or count == 0:
            return count
        if request.request_id in self._sampling:
            return count
        missing = _missing(request, num_computed_tokens)
        if request.status != RequestStatus.RUNNING:
            return self._admitted(request, partner, min(count, missing - 1))
        if missing == 1 and self._may_sample(partner):
            self._sampling |= {request.request_id, partner.request_id}
            return 1
        return min(count, missing - 1)

    def _may_sample(self, partner: Any) -> bool:
        """Whether the partner's turn comes in this step, with one token missing."""
        return (
            partner.status == RequestStatus.RUNNING
            and partner.request_id not in self._taken
            and _missing(partner, partner.num_computed_tokens) == 1
            and self._tokens_left() >= 2
        )

    def _admitted(self, request: Any, partner: Any, count: int) -> int:
        """Return how many tokens a waiting request starts with, 0 for not yet."""
        if partner.request_id in self._taken:
            return count
        running = len(self.running) + self.num_waiting_for_streaming_input
        left = self._tokens_left()
        if running + 2 > self.max_num_active_reqs or left < 2:
            return 0
        if list(islice(self.waiting, 2)) != [request, partner]:
            return 0
        return min(count, left - 1)

    def _tokens_left(self) -> int:
        budget = min(
            self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens
        )
        return budget - sum(self._taken.values())

    def _allocate_slots(
        self,
        request: Any,
        num_new_tokens: int,
        *args: Any,
        reserved_blocks: int = 0,
        **kwargs: Any,
    ) -> Any:
        """Give blocks only while the partner's turn will find its own.

        With a request left behind there are none for anybody: vLLM's answer is to
        preempt the next one in line, which is the one left behind.
        """
        if self._left_behind:
            return None
        partner = self.pairs.other(request.request_id)
        if partner is not None and partner.request_id not in self._taken:
            reserved_blocks += self._blocks(partner)
            if request.status != RequestStatus.RUNNING:
                start = request.num_computed_tokens + kwargs["num_new_computed_tokens"]
                chunk = self._blocks(request, start + num_new_tokens)
                reserved_blocks += self._blocks(request) - chunk
                reserved_blocks += self.kv_cache_manager.watermark_blocks
        blocks = self._allocate(
            request, num_new_tokens, *args, reserved_blocks=reserved_blocks, **kwargs
        )
        if blocks is not None:
            self._taken[request.request_id] = num_new_tokens
        return blocks

    def _blocks(self, request: Any, num_tokens: int | None = None) -> int:
        """Return the blocks a request lacks for so many tokens, default all."""
        if num_tokens is None:
            num_tokens = request.num_tokens + request.num_output_placeholders
        num_tokens = min(num_tokens, self.max_model_len)
        manager = self.kv_cache_manager
        return manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=num_tokens,
            new_computed_blocks=manager.empty_kv_cache_blocks.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=request.num_computed_tokens,
            num_local_computed_tokens=request.num_computed_tokens,
            num_tokens_main_model=num_tokens,
            prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )

    def _preempt_request(self, request: Any, *args: Any, **kwargs: Any) -> None:
        self._taken.pop(request.request_id, None)
        self._unfile(request)
        super()._preempt_request(request, *args, **kwargs)
        partner = self.pairs.other(request.request_id)
        if request in self._left_behind:
            self._left_behind.remove(request)
        elif partner is not None and partner.status == RequestStatus.RUNNING:
            self._left_behind.append(partner)

    def _unfile(self, request: Any) -> None:
        """Take blocks out of the prefix cache that will not be computed after all.

        vLLM 0.32 files a block when it is given, and under the priority policy may
        take a request out of the step again: its blocks would serve others unwritten.
        """
        manager = self.kv_cache_manager
        groups = manager.kv_cache_config.kv_cache_groups
        for group, ids in zip(
            groups, manager.get_block_ids(request.request_id), strict=True
        ):
            first = request.num_computed_tokens // group.kv_cache_spec.block_size
            manager.evict_blocks(set(ids[first:]))

    def _update_after_schedule(self, scheduler_output: Any) -> None:
        # the loop ended with a preemption: who was left behind has had no turn;
        # Model Runner V2 hears of it, as the output holds vLLM's own set of preempted
        for request in list(self._left_behind):
            self.running.remove(request)
            self._preempt_request(request, time.monotonic())
        self._check_lockstep(scheduler_output.num_scheduled_tokens)
        super()._update_after_schedule(scheduler_output)

    def _check_lockstep(self, scheduled: Mapping[str, int]) -> None:
        """Fail pairs of which one samples without the other: the last line of defence.

        Without it, a scheduler that grew another way to choose tokens would give
        wrong text without a word.
        """
        for follower_id in self.pairs:
            lead = self.pairs.other(follower_id)
            pair = (lead, self.pairs.other(lead.request_id))
            samples = [
                scheduled.get(r.request_id) == _missing(r, r.num_computed_tokens)
                for r in pair
            ]
            if samples[0] != samples[1]:
                self.fail(lead, "its two streams fell out of step")

    def fail(self, lead: Any, reason: str) -> None:
        """Let the next output end a request with an error."""
        logger.error("moe-tta ends request %s: %s", lead.request_id, reason)
        # vLLM's own way to end requests that it finds broken while scheduling
        self.grammar_compile_error_reqs.add(lead.request_id)


def _missing(request: Any, num_computed_tokens: int) -> int:
    """Return the tokens to compute until the request samples."""
    known = request.num_tokens + request.num_output_placeholders
    return known - num_computed_tokens
