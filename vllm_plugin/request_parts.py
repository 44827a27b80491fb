# SPDX-License-Identifier: Apache-2.0
"""What admission puts on an engine request beside its plans."""

from __future__ import annotations

from typing import Any

from moe_tta.compiled import CompiledPair, CompiledRequest
from moe_tta.errors import RequestError
from moe_tta.rounds import RequestRounds
from moe_tta.settings import AdapterSettings
from moe_tta.spec import PARAMETER
from moe_tta.vllm_plugin import compat, pair_limits, round_limits
from moe_tta.vllm_plugin.pair_metrics import count_refused
from moe_tta.vllm_plugin.pairs import Ask


def prompt_len(request: Any) -> int:
    """Return the tokens of an engine request's prompt."""
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return request.prompt_embeds.shape[0]


def second_stream(vllm_config: Any, request: Any, pair: CompiledPair) -> Ask:
    """Return what a request says about its second stream.

    Args:
        vllm_config: The engine's configuration.
        request: vLLM's engine request, with the client's own salt.
        pair: What it asks for.

    Raises:
        VLLMValidationError: a request like this cannot have one.
    """
    reason = pair_limits.request_reason(vllm_config, request)
    if reason is not None:
        count_refused(vllm_config)
        raise compat.request_error(RequestError(reason, PARAMETER))
    weak, own_salt = pair.weak, request.cache_salt
    salt = weak.salt(prompt_len(request), own_salt)
    return Ask(
        combination=pair.combination,
        numbers=pair.numbers,
        extra_args={} if weak.neutral else {PARAMETER: weak.to_wire()},
        cache_salt=own_salt if salt is None else salt,
    )


def rounds(
    vllm_config: Any,
    settings: AdapterSettings,
    request: Any,
    compiled: CompiledRequest,
) -> RequestRounds:
    """Return what a request says about its rounds.

    Args:
        vllm_config: The engine's configuration.
        settings: The operator's.
        request: vLLM's engine request.
        compiled: What it asks for, rounds among it.

    Raises:
        VLLMValidationError: a request like this cannot have any.
    """
    reason = round_limits.request_reason(request, settings.max_context)
    if reason is None and compiled.rounds.work.probes:
        reason = round_limits.probe_reason(vllm_config)
    if reason is not None:
        raise compat.request_error(RequestError(reason, PARAMETER))
    end = compiled.prompt_tokens or prompt_len(request)
    return RequestRounds(*compiled.rounds, end, settings.max_context)
