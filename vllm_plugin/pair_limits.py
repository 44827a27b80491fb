# SPDX-License-Identifier: Apache-2.0
"""What pairs are refused for, each with its reason: HTTP 400, in the API process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.core.sched.scheduler import Scheduler

from moe_tta.vllm_plugin import upstream


def scheduler_reason(scheduler_cls: type) -> str | None:
    """Say why this scheduler class can run no pairs; `None` if it can.

    Args:
        scheduler_cls: vLLM's own choice, or the operator's.
    """
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        return "two streams are kept in step on CPUs and NVIDIA GPUs only"
    if not issubclass(scheduler_cls, Scheduler):
        return f"the scheduler class {scheduler_cls.__name__} is not vLLM's own"
    changed = upstream.changed()
    if changed:
        return (
            "this vLLM differs from the one pairs were written for, in "
            + ", ".join(name.split(":")[1] for name in changed[:3])
            + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")
        )
    return None


def engine_reason(vllm_config: Any) -> str | None:
    """Say why an engine serves no pairs; `None` if it does."""
    scheduler = vllm_config.scheduler_config
    if scheduler.max_num_seqs < 2:
        return "this engine runs one sequence at a time (max_num_seqs 1)"
    if not scheduler.enable_chunked_prefill:
        return "this engine reads prompts whole (chunked prefill is off)"
    if vllm_config.watermark_config is not None:
        return "this engine watermarks its text"
    return _runner_reason(vllm_config) or scheduler_reason(
        scheduler.get_scheduler_cls()
    )


def _runner_reason(vllm_config: Any) -> str | None:
    """Say why the worker could not combine two rows of logits.

    Tensor parallelism is none: each rank gathers all logits and samples alone.
    """
    if current_platform.is_cpu():
        return None
    if not vllm_config.use_v2_model_runner:
        return "on GPUs two streams are combined in Model Runner V2 only"
    if vllm_config.parallel_config.enable_batch_sharded_sampling:
        return "batch-sharded sampling may give the two streams to different GPUs"
    return None


def request_reason(vllm_config: Any, request: Any) -> str | None:
    """Say why a request cannot be given a follower; `None` if it can.

    Args:
        vllm_config: The engine's configuration.
        request: vLLM's `EngineCoreRequest`.
    """
    params = request.sampling_params
    if params is None:
        return "only generation can have two streams, not pooling"
    if params.prompt_logprobs is not None:
        return "prompt_logprobs would be those of one stream alone"
    if request.prompt_token_ids is None or request.mm_features:
        return "the prompt must be text"
    if len(request.prompt_token_ids) < 2:
        return "the prompt must have at least 2 tokens"
    return next(_capacity(vllm_config, len(request.prompt_token_ids), params), None)


def _capacity(vllm_config: Any, prompt_len: int, params: Any) -> Iterator[str]:
    """Refuse a pair whose two sequences would never fit the KV cache at once."""
    cache = vllm_config.cache_config
    length = vllm_config.model_config.max_model_len
    if params.max_tokens is not None:
        length = min(length, prompt_len + params.max_tokens)
    needed = 2 * -(-length // cache.block_size)
    # one block is vLLM's own placeholder
    there = cache.num_gpu_blocks - 1
    there -= int(vllm_config.scheduler_config.watermark * cache.num_gpu_blocks)
    if needed > there:
        yield (
            f"two sequences of up to {length} tokens need {needed} KV blocks of "
            f"{cache.block_size} tokens, and this engine has {there}; lower max_tokens"
        )
