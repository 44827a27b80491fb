# SPDX-License-Identifier: Apache-2.0
"""A mix-in for vLLM's scheduler: what vLLM asks of each request costs nothing at first.

Until a request comes with a second stream or with rounds, the methods that vLLM calls
once or more for every request are its own.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, ClassVar

from moe_tta.vllm_plugin.pairs import PAIR
from moe_tta.vllm_plugin.round_orders import ROUNDS

PER_REQUEST = (
    "_handle_blocked_waiting_request",
    "_get_local_prefix_cache_hit",
    "_reserve_prefill_lookahead",
    "_free_request",
)


class Waking:
    """Puts vLLM's own methods over the other mix-ins', and takes them away when needed.

    The other mix-ins' versions do no more than vLLM's while there are no pairs and no
    rounds. Once awake the scheduler stays so: steps on their way may still be theirs.
    """

    vllms: ClassVar[type]  # the scheduler class that all of this is mixed into

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for name in PER_REQUEST:
            setattr(self, name, MethodType(getattr(self.vllms, name), self))
        self._awake = False

    def add_request(self, request: Any) -> None:
        """Add a request; the first one with a pair or rounds wakes the rest."""
        params = request.sampling_params
        asked = params.extra_args if params else None
        if asked and not self._awake and (PAIR in asked or ROUNDS in asked):
            for name in PER_REQUEST:
                delattr(self, name)
            self._awake = True
            self.follow_blocks()
        super().add_request(request)
