# SPDX-License-Identifier: Apache-2.0
"""Pairs: a request and its hidden follower, which reads the same text otherwise.

Admission writes an `Ask` on the request; the scheduler makes the follower from it and
leaves a `Link` on that; the worker combines the two rows by the link. None of them
knows what the combination is for.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, fields
from typing import Any

PAIR = "moe_tta_pair"
FOLLOWER = "+follower"  # ends a follower's id; sorts right after its lead's


@dataclass(frozen=True)
class Ask:
    """What a request says about its follower, as plain types.

    Attributes:
        combination: Name in `kernels.contrast.COMBINE`.
        numbers: What the combination takes.
        extra_args: The follower's own, beside its link.
        cache_salt: The follower's own.
    """

    combination: str
    numbers: tuple[float, ...]
    extra_args: dict[str, Any]
    cache_salt: str | None

    def to_wire(self) -> dict[str, Any]:
        """Return plain types that msgpack can carry to the engine."""
        return {**asdict(self), "numbers": list(self.numbers)}

    @staticmethod
    def is_wire(wire: dict[str, Any]) -> bool:
        """Whether `to_wire` could have written this."""
        return wire.keys() == {field.name for field in fields(Ask)}

    @staticmethod
    def take(request: Any) -> Ask | None:
        """Remove and return the ask of a vLLM `Request`; `None` without one."""
        params = request.sampling_params
        wire = (params.extra_args or {}).get(PAIR) if params else None
        if wire is None:
            return None
        # in one process, the n completions of a prompt share their parameters
        left = {k: v for k, v in params.extra_args.items() if k != PAIR}
        request.sampling_params = copy(params)
        request.sampling_params.extra_args = left or None
        return Ask(**{**wire, "numbers": tuple(wire["numbers"])})


@dataclass(frozen=True)
class Link:
    """What a follower tells the worker: whose logits to combine with, and how."""

    lead: str
    combination: str
    numbers: tuple[float, ...]

    def to_wire(self) -> dict[str, Any]:
        """Return plain types that msgpack can carry to the worker."""
        return {**asdict(self), "numbers": list(self.numbers)}

    @staticmethod
    def read(request: Any) -> Link | None:
        """Read a scheduled request; `None` unless it is a follower."""
        params = request.sampling_params
        wire = (params.extra_args or {}).get(PAIR) if params else None
        if wire is None:
            return None
        return Link(**{**wire, "numbers": tuple(wire["numbers"])})


def make_follower(lead: Any, ask: Ask) -> Any:
    """Return the hidden vLLM `Request` that reads the lead's text beside it.

    It is given the lead's tokens, so nothing but its length can end it.
    """
    from vllm.sampling_params import SamplingParams

    link = Link(lead.request_id, ask.combination, ask.numbers)
    follower = SamplingParams(
        temperature=lead.sampling_params.temperature,
        max_tokens=lead.max_tokens,
        ignore_eos=True,
        detokenize=False,
        skip_reading_prefix_cache=lead.sampling_params.skip_reading_prefix_cache,
        extra_args={**ask.extra_args, PAIR: link.to_wire()},
    )
    return type(lead)(
        request_id=lead.request_id + FOLLOWER,
        prompt_token_ids=copy(lead.prompt_token_ids),
        sampling_params=follower,
        pooling_params=None,
        client_index=lead.client_index,
        arrival_time=lead.arrival_time,
        cache_salt=ask.cache_salt,
        priority=lead.priority,
        block_hasher=lead._block_hasher,
    )


class PairTable:
    """The living pairs of a scheduler, found by either request's id."""

    def __init__(self) -> None:
        self._other: dict[str, Any] = {}
        self._followers: set[str] = set()

    def __len__(self) -> int:
        return len(self._followers)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the followers' ids."""
        return iter(self._followers)

    def add(self, lead: Any, follower: Any) -> None:
        """Remember a new pair."""
        self._other[lead.request_id] = follower
        self._other[follower.request_id] = lead
        self._followers.add(follower.request_id)

    def other(self, request_id: str) -> Any | None:
        """Return the partner of a request; `None` for one without."""
        return self._other.get(request_id)

    def follows(self, request_id: str) -> bool:
        """Whether a request is a follower."""
        return request_id in self._followers

    def remove(self, request_id: str) -> None:
        """Forget the pair of a request, if it has one."""
        partner = self._other.pop(request_id, None)
        if partner is not None:
            self._other.pop(partner.request_id, None)
            self._followers -= {request_id, partner.request_id}
