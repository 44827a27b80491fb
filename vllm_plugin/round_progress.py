# SPDX-License-Identifier: Apache-2.0
"""How far one request's rounds have come."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moe_tta.rounds import RequestRounds, Round
from moe_tta.vllm_plugin.round_orders import Reader


@dataclass(eq=False)
class Progress:
    """How far a request's rounds have come.

    Attributes:
        request: vLLM's `Request`.
        rounds: Its rounds.
        number: Of the next round, or of the one that is due or running.
        starts: First rows of the versions that exist.
        handed: Rows 0 .. handed - 1 have been given to the worker at some time.
        due: Whether the next round stands in the queue.
        ended: Whether its text has become too long for another round.
    """

    request: Any
    rounds: RequestRounds
    number: int = 0
    starts: list[int] = field(default_factory=list)
    handed: int = 0
    due: bool = False
    ended: bool = False

    @property
    def next(self) -> Round | None:
        """The next round, due or not; `None` after the last."""
        return self.rounds.round(self.number)

    @property
    def awaited(self) -> int | None:
        """The first row that must not be computed yet."""
        found = self.next
        return None if found is None else found.start

    def reader(self) -> Reader:
        """Return the next round and the text that it reads."""
        request = self.request
        tokens = list(request.all_token_ids[: self.next.context])
        return Reader(request.request_id, self.number, tokens, self.rounds.prompt_len)
