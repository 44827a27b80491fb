# SPDX-License-Identifier: Apache-2.0
"""What a request says about routing once it is checked: plans, salt and wire form."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from moe_tta.errors import RequestError
from moe_tta.plan import RoutingPlan
from moe_tta.rounds import AskedRounds
from moe_tta.spec import PARAMETER

SALT_PREFIX = "moe-tta:"


@dataclass(frozen=True)
class CompiledRequest:
    """What one request says about routing, checked against the model.

    Attributes:
        plans: One per `SEGMENTS`; `None` is the model's own rule.
        cached: Whether each segment's plan can change the KV cache.
        pair: The second stream, if the request asks for one.
        prompt_tokens: Where the prompt ends for the plans; `None` at its real end.
        rounds: What computes the plans anew while the request runs, if it asks for it.
    """

    plans: tuple[RoutingPlan | None, RoutingPlan | None, RoutingPlan | None]
    cached: tuple[bool, bool, bool]
    pair: CompiledPair | None = None
    prompt_tokens: int | None = None
    rounds: AskedRounds | None = None

    @property
    def neutral(self) -> bool:
        """Whether the request leaves every row of its own to the model."""
        return not any(self.plans)

    def salt(self, prompt_len: int, client_salt: str | None) -> str | None:
        """Return the prefix-cache salt that keeps other plans' KV away.

        Two requests get the same salt only if equal tokens at equal positions have
        equal KV in both. The prompt's length is part of it where segments differ,
        since it says at which position one plan ends.

        Args:
            prompt_len: Prompt tokens.
            client_salt: The client's own `cache_salt`.

        Returns:
            `None` where the KV is the stock model's: keep the client's own salt.
        """
        if not any(self.cached):
            return None
        marks = [
            plan.fingerprint if cached else None
            for plan, cached in zip(self.plans, self.cached, strict=True)
        ]
        one_plan = len(set(marks)) == 1
        end = self.prompt_tokens or prompt_len
        key = [marks, None if one_plan else end, client_salt or ""]
        return SALT_PREFIX + hashlib.sha256(json.dumps(key).encode()).hexdigest()[:40]

    def check_prompt(self, prompt_len: int) -> None:
        """Refuse a prompt shorter than the request says it is.

        Raises:
            RequestError: it has fewer tokens than `prompt_tokens`.
        """
        if self.prompt_tokens is not None and self.prompt_tokens > prompt_len:
            raise RequestError(
                f"expected 1..{prompt_len}, the prompt's tokens, got "
                f"{self.prompt_tokens}",
                f"{PARAMETER}.prompt_tokens",
                self.prompt_tokens,
            )

    def to_wire(self) -> dict[str, Any]:
        """Return plain types that msgpack can carry to the engine; the caller's own."""
        return {
            "plans": dict(self._plan_bytes),
            "segments": [plan and plan.fingerprint for plan in self.plans],
            "prompt_tokens": self.prompt_tokens,
        }

    @property
    def nbytes(self) -> int:
        """Memory of the plans' arrays, and of their bytes as `to_wire` keeps them."""
        own = 2 * sum(len(data) for data in self._plan_bytes.values())
        return own if self.pair is None else own + self.pair.weak.nbytes

    @cached_property
    def _plan_bytes(self) -> dict[str, bytes]:
        plans = {plan.fingerprint: plan for plan in self.plans if plan is not None}
        return {mark: plan.to_bytes() for mark, plan in plans.items()}


@dataclass(frozen=True)
class CompiledPair:
    """A request's second stream and how the two streams' logits are combined.

    Attributes:
        combination: Name in `kernels.contrast.COMBINE`.
        numbers: What the combination takes.
        weak: The second stream's routing.
    """

    combination: str
    numbers: tuple[float, ...]
    weak: CompiledRequest


def check_client_salt(client_salt: str | None) -> None:
    """Refuse a client's salt that could name another request's steered KV.

    Raises:
        RequestError: it starts with `SALT_PREFIX`.
    """
    if client_salt is not None and client_salt.startswith(SALT_PREFIX):
        raise RequestError(
            f"must not start with {SALT_PREFIX!r}, which marks steered KV",
            "cache_salt",
            client_salt,
        )
