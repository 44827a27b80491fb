# SPDX-License-Identifier: Apache-2.0
"""Requests whose plans depend on the prompt: checked first, compiled with it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from moe_tta.compile import compile_request
from moe_tta.compiled import CompiledRequest
from moe_tta.errors import RequestError
from moe_tta.spec import RequestSpec
from moe_tta.strategies import STRATEGIES, PlanContext, Prompt


@dataclass(frozen=True)
class DeferredRequest:
    """A request that was checked and waits for its prompt."""

    spec: RequestSpec

    def compile(self, context: PlanContext, prompt: Prompt) -> CompiledRequest:
        """Compile the request for its prompt.

        Args:
            context: The model and the operator's files.
            prompt: The whole prompt; `prompt_tokens` cuts it here.

        Raises:
            RequestError: the routers cannot honour it, or the prompt has no text.
        """
        end = self.spec.prompt_tokens
        if end is not None and prompt.token_ids is not None:
            prompt = replace(prompt, token_ids=prompt.token_ids[:end])
        return compile_request(self.spec, replace(context, prompt=prompt))


def compile_or_defer(
    spec: RequestSpec, context: PlanContext
) -> CompiledRequest | DeferredRequest:
    """Compile a request, or check it where its plans depend on the prompt.

    Raises:
        RequestError: the model's routers cannot honour the request.
    """
    readers = list(_readers(spec))
    if not readers:
        return compile_request(spec, context)
    for stream, name in readers:
        try:
            STRATEGIES[name].check(stream.members[name], context)
        except RequestError as err:
            raise err.under(f"{stream.root}.{name}") from err
    compile_request(_without_readers(spec), context)
    return DeferredRequest(spec)


def _readers(spec: RequestSpec) -> Iterator[tuple[RequestSpec, str]]:
    """Yield the members, of both streams, that read the prompt."""
    for stream in (spec, spec.pair.weak) if spec.pair else (spec,):
        for name in stream.members:
            if STRATEGIES[name].check is not None:
                yield stream, name


def _without_readers(spec: RequestSpec) -> RequestSpec:
    others = {n: p for n, p in spec.members.items() if STRATEGIES[n].check is None}
    pair = spec.pair
    if pair is not None:
        pair = replace(pair, weak=_without_readers(pair.weak))
    return replace(spec, members=others, pair=pair)
