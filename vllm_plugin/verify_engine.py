# SPDX-License-Identifier: Apache-2.0
"""The engine that `moe-tta verify` asks, and its answers as plain data."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file

from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.model_shape import UnsupportedModelError

MAX_MODEL_LEN = 384
# so that it starts beside other engines, which vLLM's default share of a GPU forbids
ON_GPU = {"kv_cache_memory_bytes": 4 << 30, "gpu_memory_utilization": 0.05}

Request = dict[str, Any] | None


class CheckFailed(Exception):
    """A check is red; the message is its evidence."""


class Generated(NamedTuple):
    """One finished request; `logprobs` is [[token, logprob], ...] of each step."""

    request_id: str
    tokens: list[int]
    logprobs: list[list[list[float]]]
    cached: int


@dataclass
class Subject:
    """The engine under test.

    Attributes:
        llm: vLLM's offline engine.
        traces: Folder of its routing traces; `None` where it writes none.
    """

    llm: Any
    traces: Path | None = None

    @cached_property
    def shape(self) -> RouterShape:
        """The model's routers, as the plugin's admission reads them."""
        return self.llm.llm_engine.input_processor.moe_tta.shape

    @property
    def dtype(self) -> str:
        """The dtype the engine runs in."""
        return str(self.llm.llm_engine.model_config.dtype).removeprefix("torch.")

    def prompts(self, lengths: Sequence[int], seed: int) -> list[list[int]]:
        """Return random token ids, the same in every process."""
        vocab = self.llm.llm_engine.model_config.get_vocab_size()
        rng = random.Random(seed)
        return [[rng.randrange(2, vocab) for _ in range(n)] for n in lengths]

    def generate(
        self,
        prompts: Sequence[list[int]],
        requests: Sequence[Request],
        tokens: Sequence[int],
    ) -> list[Generated]:
        """Generate greedily in one batch, without KV of earlier batches."""
        self.llm.reset_prefix_cache()
        return self.resume(prompts, requests, tokens)

    def resume(
        self,
        prompts: Sequence[list[int]],
        requests: Sequence[Request],
        tokens: Sequence[int],
    ) -> list[Generated]:
        """Generate greedily in one batch; the prefix cache stays as it is."""
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=count,
                temperature=0,
                ignore_eos=True,
                logprobs=5,
                detokenize=False,
                extra_args=None if request is None else {"moe_tta": request},
            )
            for request, count in zip(requests, tokens, strict=True)
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        return [_plain(o) for o in self.llm.generate(inputs, params, use_tqdm=False)]

    def trace(self, generated: Generated, rows: int) -> dict[str, np.ndarray]:
        """Return the routing trace of a request that another one has followed."""
        found = list(self.traces.glob(f"{generated.request_id}-*.safetensors"))
        expect(
            len(found) == 1,
            f"expected one routing trace of request {generated.request_id}, found "
            f"{len(found)}: the routing hook was not called",
        )
        trace = load_file(found[0])
        complete = np.array_equal(trace["positions"], np.arange(rows))
        expect(complete, f"the routing trace does not hold positions 0..{rows - 1}")
        return trace


def _plain(output: Any) -> Generated:
    completion = output.outputs[0]
    logprobs = [
        sorted([token, entry.logprob] for token, entry in step.items())
        for step in completion.logprobs
    ]
    tokens = list(completion.token_ids)
    return Generated(output.request_id, tokens, logprobs, output.num_cached_tokens)


def expect(condition: bool, evidence: str) -> None:
    """Turn the check red unless the condition holds.

    Raises:
        CheckFailed: with the evidence.
    """
    if not condition:
        raise CheckFailed(evidence)


def start_engine(
    model: str, dtype: str, exact: bool, stock: bool, traces: Path | None
) -> Subject:
    """Start vLLM in this process.

    Args:
        model: Folder or name of the model.
        dtype: As vLLM's option.
        exact: Whether a row must not depend on how others are routed: float32 on CPU,
            where an expert's kernel rounds by how many rows it has.
        stock: Whether the plugin is switched off in this process.
        traces: Folder for routing traces, if any; only CPU engines write them.

    Raises:
        UnsupportedModelError: the plugin refuses the model.
        RuntimeError: vLLM did not load the plugin.
    """
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    from vllm import LLM

    traces = traces if on_cpu else None
    settings = {} if traces is None else {"moe_tta": {"trace_dir": str(traces)}}
    llm = LLM(
        model=model,
        dtype="float32" if exact and on_cpu else dtype,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=16,
        enforce_eager=True,
        enable_prefix_caching=True,
        skip_tokenizer_init=True,
        seed=0,
        additional_config=settings,
        **({} if on_cpu else ON_GPU),
    )
    admission = getattr(llm.llm_engine.input_processor, "moe_tta", None)
    if stock:
        assert admission is None, "MOE_TTA_DISABLE=1 left the plugin on"
    elif admission is None:
        raise RuntimeError("vLLM did not load the plugin; see moe-tta doctor")
    elif admission.shape is None:
        raise UnsupportedModelError("this model has no MoE layers to route")
    return Subject(llm, traces)
