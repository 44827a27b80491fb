# SPDX-License-Identifier: Apache-2.0
"""Real vLLM engines in this process, and their outputs as plain data."""

import gc
from contextlib import contextmanager

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.sampling_params import RequestOutputKind


@contextmanager
def engine(model, **options):
    """Run an engine; its process groups are gone before the next one starts."""
    gc.collect()
    llm = make_engine(model, **options)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def make_engine(model, **options):
    defaults = {
        "enforce_eager": True,
        "dtype": "bfloat16",
        "max_model_len": 384,
        "max_num_seqs": 16,
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
        "seed": 0,
    }
    return LLM(model=model, **{**defaults, **options})


def sampling(tokens=16, moe_tta=None, **options):
    """Greedy sampling parameters with the chosen token's logprob."""
    extra_args = None if moe_tta is None else {"moe_tta": moe_tta}
    defaults = {
        "temperature": 0.0,
        "logprobs": 0,
        "ignore_eos": True,
        "output_kind": RequestOutputKind.FINAL_ONLY,
    }
    return SamplingParams(
        max_tokens=tokens, extra_args=extra_args, **{**defaults, **options}
    )


def outputs(request, index=0):
    """Return (token_ids, logprobs) of one of a request's completions."""
    completion = request.outputs[index]
    steps = zip(completion.token_ids, completion.logprobs or [], strict=True)
    return list(completion.token_ids), [step[token].logprob for token, step in steps]


def generate(llm, prompts, params):
    """Generate from token-id prompts in one batch."""
    params = [sampling(**p) if isinstance(p, dict) else p for p in params]
    results = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False
    )
    return [outputs(result) for result in results]


def status(llm):
    """Return the first worker's plugin status."""
    return llm.collective_rpc("moe_tta_status")[0]
