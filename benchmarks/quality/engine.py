# SPDX-License-Identifier: Apache-2.0
"""Stock vLLM with the plugin, asked for many things at once."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from benchmarks.quality.arms import Arm
from moe_tta.shape import RouterShape

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput, SamplingParams


class Engine:
    """An offline engine that starts with the first request.

    Args:
        args: The shared options.
        shape: The model's routers, as wide as the arms need.
        settings: More of the operator's settings, such as `adapter`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        shape: RouterShape,
        settings: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.options = {
            "model": str(args.model),
            "dtype": args.dtype,
            "max_model_len": args.max_model_len,
            "max_num_seqs": args.max_num_seqs,
            "kv_cache_memory_bytes": int(args.kv_gib * 2**30),
            "enforce_eager": args.eager,
            "moe_backend": args.moe_backend,
            "seed": args.seed,
            "gpu_memory_utilization": args.gpu_memory_utilization,
            "additional_config": {"moe_tta": {"k_max": shape.k_max, **settings}},
        }

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        if "llm" in self.__dict__:
            from vllm.distributed import cleanup_dist_env_and_memory

            self.llm.llm_engine.engine_core.shutdown()
            del self.llm
            cleanup_dist_env_and_memory()

    @cached_property
    def llm(self) -> LLM:
        from vllm import LLM

        return LLM(**self.options)

    def run(
        self, requests: Sequence[tuple[dict[str, Any], SamplingParams]]
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Answer requests, all of them at once; each comes when it is done.

        Args:
            requests: Prompts in vLLM's form, with their sampling parameters.

        Yields:
            Index of a request and its output.
        """
        core = self.llm.llm_engine
        for index, (prompt, params) in enumerate(requests):
            core.add_request(str(index), prompt, params)
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    yield int(output.request_id), output


def sampling_params(arm: Arm, **options: Any) -> SamplingParams:
    """Return sampling parameters that carry an arm's request object."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from moe_tta import request

    extra_args = request(**arm.request).extra_args if arm.request else None
    return SamplingParams(
        extra_args=extra_args, output_kind=RequestOutputKind.FINAL_ONLY, **options
    )
