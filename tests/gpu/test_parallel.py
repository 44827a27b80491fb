# SPDX-License-Identifier: Apache-2.0
"""Two GPUs, by tensor or by expert parallelism, give what one gives.

Splitting a sum over GPUs rounds it elsewhere, so equality is asked of the tokens up to
the first near tie. In float32 (TF32 inputs are rounded the same way on both sides) a
logit of this model is a sum of fewer than 2**12 terms below 16 over 4 layers, which
bounds the difference of two orders by 2**12 * 2**-24 * 16, about 4e-3; rounding errors
are random, and what was seen is far below.
"""

import logging
import random

import pytest
import torch

from tests.plugin.engine import engine, generate, sampling
from tests.requests import random_request

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)
TIE = 4e-3
log = logging.getLogger(__name__)
OPTIONS = {
    "enforce_eager": False,
    "dtype": "float32",
    "gpu_memory_utilization": 0.04,
    "kv_cache_memory_bytes": 2**28,
    "disable_custom_all_reduce": True,
    "compilation_config": {  # full graphs, without the time of compiling
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
}


def jobs(shape):
    rng = random.Random(17)
    requests = [None, {"dynamic_k": {"k": 1}}, {"steer": {"demote": [[1, 0], [2, 3]]}}]
    requests += [random_request(rng, shape) for _ in range(37)]
    prompts = [
        [rng.randrange(2, 256) for _ in range(rng.randrange(4, 80))] for _ in requests
    ]
    return prompts, [sampling(16, request, logprobs=2) for request in requests]


def steps(output):
    """Return per step the chosen token, its logprob and the lead over the next one."""
    found = []
    for token, ranked in zip(
        output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
    ):
        first, second = sorted((p.logprob for p in ranked.values()), reverse=True)[:2]
        found.append((token, ranked[token].logprob, first - second))
    return found


def run(model, **options):
    with engine(model, **OPTIONS, **options) as llm:
        shape = llm.llm_engine.input_processor.moe_tta.shape
        found = llm.collective_rpc("moe_tta_status")
        prompts, params = jobs(shape)
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        results = llm.generate(asked, params, use_tqdm=False)
        left = llm.collective_rpc("moe_tta_status")
        generate(llm, prompts[:1], [sampling(2)])
    assert all(status["armed_layers"] == found[0]["armed_layers"] for status in found)
    return [steps(result) for result in results], len(left)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe"])
def test_two_gpus_equal_one(tiny_models, name):
    model = tiny_models(name)
    want, _ = run(model)
    for options in (
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ):
        got, workers = run(model, **options)
        assert workers == 2
        worst, ties = 0.0, 0
        for mine, theirs in zip(want, got, strict=True):
            for (token, value, lead), (other, other_value, _) in zip(
                mine, theirs, strict=True
            ):
                if token != other:
                    assert lead < TIE, (token, other, lead)
                    ties += 1
                    break
                worst = max(worst, abs(value - other_value))
        log.info("%s %s: largest error %.1e, ties %d", name, options, worst, ties)
        assert worst < TIE
        assert ties <= 2
