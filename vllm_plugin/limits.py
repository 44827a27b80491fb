# SPDX-License-Identifier: Apache-2.0
"""Set-ups the plugin refuses at load, each with its reason."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moe_tta.vllm_plugin.model_shape import UnsupportedModelError


def refuse_unsupported(vllm_config: Any, runners: Sequence[Any]) -> None:
    """Refuse what would run plans wrongly or not at all.

    Raises:
        UnsupportedModelError: the first reason found.
    """
    for reason in _reasons(vllm_config, runners):
        raise UnsupportedModelError.because(reason)


def _reasons(vllm_config: Any, runners: Sequence[Any]):
    parallel = vllm_config.parallel_config
    for name, what in (
        ("pipeline_parallel_size", "pipeline parallelism"),
        ("data_parallel_size", "data parallelism"),
        ("prefill_context_parallel_size", "prefill context parallelism"),
        ("decode_context_parallel_size", "decode context parallelism"),
    ):
        if getattr(parallel, name) > 1:
            yield f"{what} has not been shown to route rows rightly"
    if parallel.tensor_parallel_size > 1 and vllm_config.device_config.device_type == (
        "cpu"
    ):
        yield "tensor parallelism on CPU has not been shown to route rows rightly"
    if parallel.enable_eplb:
        yield "expert load balancing has not been shown to route rows rightly"
    if parallel.use_sequence_parallel_moe:
        yield "sequence-parallel MoE gives each GPU other rows than the step's"
    if parallel.use_ubatching:
        yield "micro-batching splits the rows of a step"
    if vllm_config.speculative_config is not None:
        yield "speculative decoding has not been shown to route draft rows rightly"
    if vllm_config.lora_config is not None:
        yield "LoRA adapters have not been tested with plans"
    if vllm_config.kv_transfer_config is not None:
        yield "a KV connector may ignore the cache salt that keeps plans apart"
    if any(runner.is_monolithic for runner in runners):
        yield (
            "the experts' kernel selects experts itself (monolithic); start vLLM with "
            "--moe-backend triton, or marlin for mxfp4 weights"
        )
