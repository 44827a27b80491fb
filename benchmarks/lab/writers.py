# SPDX-License-Identifier: Apache-2.0
"""Models that write texts, in transformers or in vLLM."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.lab.generate import generate
from benchmarks.lab.routing import routed

MAX_MODEL_LEN = 2048
KV_BYTES = 2**30  # on CPU, all vLLM may take for keys and values

# from prompts, stop strings and the most tokens of a text to the texts
Write = Callable[[Sequence[str], Sequence[str], int], list[str]]


@contextmanager
def in_transformers(folder: Path, routing: str | None, batch: int) -> Iterator[Write]:
    """A model in bfloat16 on the GPU where there is one.

    Args:
        folder: its checkpoint.
        routing: of an MoE, as `routed` takes it; `None` for a dense model.
        batch: prompts at once.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    top_k = getattr(model.config, "num_experts_per_tok", None)
    with routed(model, routing, top_k) if routing else nullcontext():
        yield lambda prompts, stop, most: generate(
            model, tokenizer, prompts, stop, most, batch
        )


@contextmanager
def in_vllm(folder: Path, routing: str | None, batch: int) -> Iterator[Write]:
    """A model in bfloat16 in vLLM, with its own routing.

    Args:
        folder: its checkpoint.
        routing: of an MoE: ``learned``.
        batch: prompts at once.

    Raises:
        ValueError: another routing is asked for.
    """
    if routing not in (None, "learned"):
        raise ValueError(f"vLLM runs the learned routing here, not {routing}")
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(folder),
        dtype="bfloat16",
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=batch,
        enforce_eager=True,
        kv_cache_memory_bytes=KV_BYTES,
    )

    def write(prompts: Sequence[str], stop: Sequence[str], most: int) -> list[str]:
        params = SamplingParams(temperature=0, max_tokens=most, stop=list(stop))
        outputs = llm.generate(list(prompts), params)
        return [output.outputs[0].text for output in outputs]

    try:
        yield write
    finally:
        llm.llm_engine.engine_core.shutdown()


WRITERS = {"transformers": in_transformers, "vllm": in_vllm}
