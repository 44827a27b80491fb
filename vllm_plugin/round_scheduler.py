# SPDX-License-Identifier: Apache-2.0
"""A mix-in for vLLM's scheduler: requests whose plan is computed while they run.

Where a request's next version is awaited it gets no rows, like a request whose tokens
are all computed; a waiting one is passed over. Everybody else goes on, beside the
adapter's work that the budget allows in each step.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable
from copy import copy
from typing import Any

from moe_tta.rounds import RequestRounds
from moe_tta.vllm_plugin.options import read_settings
from moe_tta.vllm_plugin.round_orders import ORDERS, REPORTS, ROUNDS
from moe_tta.vllm_plugin.round_queue import RoundQueue


class RoundScheduler:
    """Gives rounds their turns, and rows their rounds."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        settings = read_settings(self.vllm_config).adapter
        limits = (settings.budget, settings.batch_tokens) if settings else (0, 0)
        self.rounds = RoundQueue(*limits)
        self._reports: dict[str, list[dict[str, Any]]] = defaultdict(list)

    def add_request(self, request: Any) -> None:
        """Add a request, and its rounds if it asks for them."""
        rounds = _take(request)
        if rounds is not None:
            hide_blocks(request, rounds.first_row // self.hash_block_size)
            self.rounds.add(request, rounds)
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, and what the adapter does before it."""
        output = super().schedule(*args, **kwargs)
        if self.rounds:
            self.rounds.note_handed()
            for request_id, report in self.rounds.ended():
                self._reports[request_id].append(report)
            orders = self.rounds.orders(idle=not output.total_num_scheduled_tokens)
            if orders:
                setattr(output, ORDERS, orders)
        return output

    def _handle_blocked_waiting_request(self, request: Any) -> bool:
        ready = super()._handle_blocked_waiting_request(request)
        return ready and not self.rounds.holds_back(request)

    def _reserve_prefill_lookahead(
        self, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        count = super()._reserve_prefill_lookahead(
            request, num_computed_tokens, num_new_tokens
        )
        return self.rounds.limit(request.request_id, num_computed_tokens, count)

    def update_from_output(
        self, scheduler_output: Any, model_runner_output: Any
    ) -> dict[int, Any]:
        """Take in a step's tokens; pass the worker's reports on with them."""
        for request_id, report in getattr(model_runner_output, REPORTS, ()):
            self._reports[request_id].append(report)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if self._reports:
            self._pass_on(outputs)
        return outputs

    def _pass_on(self, outputs: dict[int, Any]) -> None:
        """Put reports where KV connectors write; engines with one are refused."""
        for client in outputs.values():
            for output in client.outputs:
                reports = self._reports.pop(output.request_id, None)
                if reports:
                    output.kv_transfer_params = {REPORTS: reports}
        for request_id in self._reports.keys() - self.requests.keys():
            del self._reports[request_id]

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        self.rounds.remove(request.request_id)
        return super()._free_request(request, *args, **kwargs)


def _take(request: Any) -> RequestRounds | None:
    """Remove and return the rounds of a vLLM `Request`; `None` without any."""
    params = request.sampling_params
    wire = (params.extra_args or {}).get(ROUNDS) if params else None
    if wire is None:
        return None
    # in one process, the n completions of a prompt share their parameters
    left = {k: v for k, v in params.extra_args.items() if k != ROUNDS}
    request.sampling_params = copy(params)
    request.sampling_params.extra_args = left or None
    return RequestRounds.from_wire(wire)


def hide_blocks(request: Any, first: int) -> None:
    """Make a request's KV blocks from number `first` on its own in the prefix cache.

    Its own they stay: after preemption the same rows have the same versions again.
    """
    hash_blocks = request._block_hasher
    if hash_blocks is None:  # no prefix cache
        return
    del request.block_hashes[first:]
    request._block_hasher = _private(hash_blocks, first, request.request_id.encode())
    request.update_block_hashes()


def _private(
    hash_blocks: Callable[[Any], list[bytes]], first: int, key: bytes
) -> Callable[[Any], list[bytes]]:
    def hash_privately(request: Any) -> list[bytes]:
        known = len(request.block_hashes)
        return [
            made if number < first else hashlib.sha256(made + key).digest()
            for number, made in enumerate(hash_blocks(request), known)
        ]

    return hash_privately
