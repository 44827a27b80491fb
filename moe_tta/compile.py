# SPDX-License-Identifier: Apache-2.0
"""From a request to the routing plans of its three segments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from moe_tta.compiled import CompiledPair, CompiledRequest
from moe_tta.errors import RequestError
from moe_tta.plan import PlanError, Renorm, RoutingPlan, merge
from moe_tta.rounds import AskedRounds
from moe_tta.shape import RouterShape
from moe_tta.spans import SEGMENTS, span_segments
from moe_tta.spec import RequestSpec
from moe_tta.strategies import PAIRS, ROUNDS, STRATEGIES, PlanContext


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
