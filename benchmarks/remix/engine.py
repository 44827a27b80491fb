# SPDX-License-Identifier: Apache-2.0
"""An offline engine that serves stores, without a tokenizer or a prefix cache."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM, SamplingParams


@contextmanager
def serving(args: argparse.Namespace, stores: Mapping[str, str]) -> Iterator[LLM]:
    """Yield an engine; it is shut down at the end.

    Args:
        args: `model`, `dtype`; `prompt` and `generated`, lengths in tokens.
        stores: Folders by name.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    llm = LLM(
        str(args.model),
        dtype=args.dtype,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        max_model_len=args.prompt + args.generated + 1,
        additional_config={
            "moe_tta": {"stores": dict(stores), "max_store_mib": 1 << 20}
        },
    )
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


def greedy(args: argparse.Namespace, request: dict | None) -> SamplingParams:
    """Return parameters of `args.generated` greedy tokens that carry a request."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0,
        max_tokens=args.generated,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if request is None else {"moe_tta": request},
    )
