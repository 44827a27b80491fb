# SPDX-License-Identifier: Apache-2.0
"""From a request to the routing plans of its three segments, and their salt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from moe_tta.errors import RequestError
from moe_tta.plan import PlanError, Renorm, RoutingPlan, merge
from moe_tta.rounds import AskedRounds
from moe_tta.shape import RouterShape
from moe_tta.spans import SEGMENTS, span_segments
from moe_tta.spec import PARAMETER, RequestSpec
from moe_tta.strategies import PAIRS, ROUNDS, STRATEGIES, PlanContext

SALT_PREFIX = "moe-tta:"
WIRE_FORMAT = 1


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
            "format": WIRE_FORMAT,
            "plans": dict(self._plan_bytes),
            "segments": [plan and plan.fingerprint for plan in self.plans],
            "cached": list(self.cached),
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

    @staticmethod
    def from_wire(
        wire: Mapping[str, Any], known: Mapping[str, RoutingPlan] | None = None
    ) -> CompiledRequest:
        """Read what `to_wire` wrote.

        Args:
            wire: Its result.
            known: Plans by fingerprint that need not be decoded again.

        Raises:
            ValueError: another format.
        """
        if wire["format"] != WIRE_FORMAT:
            raise ValueError(f"wire format {wire['format']}, expected {WIRE_FORMAT}")
        known = known or {}
        plans = {
            mark: known.get(mark) or RoutingPlan.from_bytes(data)
            for mark, data in wire["plans"].items()
        }
        chosen = (mark and plans[mark] for mark in wire["segments"])
        return CompiledRequest(
            tuple(chosen), tuple(wire["cached"]), prompt_tokens=wire["prompt_tokens"]
        )


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


def compile_request(spec: RequestSpec, context: PlanContext) -> CompiledRequest:
    """Write, merge and check the plans of a request, of both streams of a pair.

    Raises:
        RequestError: the model's routers cannot honour the request.
    """
    compiled = _compile_stream(spec, context)
    if spec.adapting is not None:
        return replace(compiled, rounds=_ask_rounds(spec, context))
    if spec.pair is None:
        return compiled
    try:
        weak = _compile_stream(spec.pair.weak, context)
    except RequestError as err:
        raise err.renamed(spec.pair.shorthands) from err
    combination, numbers = PAIRS[spec.pair.name].combination(spec.pair.params)
    return replace(compiled, pair=CompiledPair(combination, numbers, weak))


def _ask_rounds(spec: RequestSpec, context: PlanContext) -> AskedRounds | None:
    name = spec.adapting
    try:
        if spec.rounds is None:
            return STRATEGIES[name].rounds(spec.members[name], context)
        params = spec.rounds.params
        return AskedRounds(ROUNDS[name].work(params, context), params.schedule)
    except RequestError as err:
        raise err.under(f"{spec.root}.{name}") from err


def _compile_stream(spec: RequestSpec, context: PlanContext) -> CompiledRequest:
    shape = context.shape
    written = {name: _plan_of(name, spec, context) for name in spec.members}
    everywhere = RoutingPlan()
    if spec.renorm != "model":
        code = Renorm[spec.renorm.upper()]
        everywhere = RoutingPlan(renorm=np.full(len(shape.layers), code, np.int32))
    done: dict[tuple[str, ...], tuple[RoutingPlan | None, bool]] = {}
    active_in = [
        tuple(n for n, p in spec.members.items() if span_segments(p.span)[index])
        for index in range(len(SEGMENTS))
    ]
    for active in active_in:
        if active not in done:
            parts = {name: written[name] for name in active}
            plan = _merged(parts, everywhere, spec, shape)
            chosen = None if plan.neutral else plan
            done[active] = chosen, _touches_cache(plan, shape)
    plans, cached = zip(*(done[active] for active in active_in), strict=True)
    return CompiledRequest(plans, cached, prompt_tokens=spec.prompt_tokens)


def _plan_of(name: str, spec: RequestSpec, context: PlanContext) -> RoutingPlan:
    try:
        return STRATEGIES[name].plan(spec.members[name], context)
    except RequestError as err:
        raise err.under(f"{spec.root}.{name}") from err


def _merged(
    parts: Mapping[str, RoutingPlan],
    everywhere: RoutingPlan,
    spec: RequestSpec,
    shape: RouterShape,
) -> RoutingPlan:
    try:
        plan = merge([everywhere, *parts.values()]).normalised()
        plan.validate(shape)
    except PlanError as err:
        raise RequestError(*_blame(err, parts, spec, shape)) from err
    return plan


def _blame(
    err: PlanError,
    parts: Mapping[str, RoutingPlan],
    spec: RequestSpec,
    shape: RouterShape,
) -> tuple[str, str]:
    """Return the message, and the narrowest parameter that is wrong by itself."""
    for name, plan in parts.items():
        given = spec.members[name].model_fields_set
        for member, array in plan.arrays().items():
            alone = RoutingPlan(**{member: array})
            if member in given and _is_wrong(alone, shape):
                return str(err), f"{spec.root}.{name}.{member}"
        if _is_wrong(plan, shape):
            return str(err), f"{spec.root}.{name}"
    names = " and ".join(parts)
    return f"{names} clash where their spans overlap: {err}", spec.root


def _is_wrong(plan: RoutingPlan, shape: RouterShape) -> bool:
    try:
        plan.normalised().validate(shape)
    except PlanError:
        return True
    return False


def _touches_cache(plan: RoutingPlan, shape: RouterShape) -> bool:
    """Whether KV can differ from the stock model's.

    The last decoder layer's experts feed the logits and no key or value.
    """
    edited = plan.edited_layers()
    if shape.layers[-1] == shape.num_hidden_layers - 1:
        edited = edited[:-1]
    return bool(edited.any())
