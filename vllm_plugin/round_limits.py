# SPDX-License-Identifier: Apache-2.0
"""What rounds are refused for, each with its reason: HTTP 400, in the API process."""

from __future__ import annotations

from typing import Any

from moe_tta.vllm_plugin.pair_limits import scheduler_reason


def engine_reason(vllm_config: Any, enabled: bool) -> str | None:
    """Say why an engine serves no rounds; `None` if it does.

    Args:
        vllm_config: The engine's configuration.
        enabled: Whether the operator set `adapter`.
    """
    if not enabled:
        return (
            "this engine adapts no requests; its operator can set adapter in "
            "--additional-config"
        )
    scheduler = vllm_config.scheduler_config
    if not scheduler.enable_chunked_prefill:
        return "this engine reads prompts whole (chunked prefill is off)"
    return scheduler_reason(scheduler.get_scheduler_cls())


def probe_reason(vllm_config: Any) -> str | None:
    """Say why an engine cannot score texts under plans; `None` if it can.

    Args:
        vllm_config: The engine's configuration.
    """
    mode = vllm_config.model_config.logprobs_mode
    if mode in ("raw_logits", "processed_logits"):
        return (
            f"optimizer 'spsa' needs log-probabilities, and this engine gives {mode} "
            "(--logprobs-mode)"
        )
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        return "with --kv-sharing-fast-prefill this engine cannot score prompts"
    return None


def request_reason(request: Any, max_context: int) -> str | None:
    """Say why a request cannot be adapted; `None` if it can.

    Args:
        request: vLLM's `EngineCoreRequest`.
        max_context: The operator's setting.
    """
    if request.sampling_params is None:
        return "only generation can be adapted, not pooling"
    if request.prompt_token_ids is None or request.mm_features:
        return "the prompt must be text"
    if len(request.prompt_token_ids) > max_context:
        return (
            f"this engine adapts to at most {max_context} tokens (adapter.max_context),"
            f" and the prompt has {len(request.prompt_token_ids)}"
        )
    return None
