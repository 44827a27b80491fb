# SPDX-License-Identifier: Apache-2.0
"""Two GPUs, by tensor or by expert parallelism, give what one gives.

Splitting a sum over GPUs rounds it elsewhere, and vLLM's experts round float32 inputs
to TF32, so the same engines without plans say how far two GPUs are from one.
"""

import logging
import random
from typing import NamedTuple

import pytest
import torch

from tests.plugin.engine import engine, generate, sampling
from tests.requests import random_request

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < 2, reason="needs two CUDA devices"
)
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
MODELS = ["olmoe", "mixtral"]
COUNT = 60  # requests with a plan, as many without, and as many contrasted
BETA = 0.5
CONTRAST = {"contrast": {"weak": {"rank": 2}, "beta": BETA, "alpha": 0}}


class Gap(NamedTuple):
    """How far the text of two GPUs is from one's."""

    logprob: float  # largest difference, up to where the texts part
    parted: float  # difference of the two tokens' logprobs there, 0 if they do not


def gap(got, want):
    worst = 0.0
    for (token, value), (other, other_value) in zip(
        zip(*got, strict=True), zip(*want, strict=True), strict=True
    ):
        worst = max(worst, abs(value - other_value))
        if token != other:
            return Gap(worst, abs(value - other_value))
    return Gap(worst, 0.0)


def worst(found):
    return max(max(g.logprob, g.parted) for g in found)


def run(model, **options):
    rng = random.Random(17)
    prompts = [
        [rng.randrange(2, 256) for _ in range(rng.randrange(4, 80))]
        for _ in range(3 * COUNT)
    ]
    with engine(model, **OPTIONS, **options) as llm:
        shape = llm.llm_engine.input_processor.moe_tta.shape
        found = llm.collective_rpc("moe_tta_status")
        requests = [random_request(rng, shape) for _ in range(COUNT)]
        requests += [None] * COUNT + [CONTRAST] * COUNT
        results = generate(llm, prompts, [sampling(16, r) for r in requests])
    assert all(status["armed_layers"] == [0, 1, 2, 3] for status in found)
    return results, len(found)


@pytest.fixture(scope="module")
def one_gpu(tiny_models):
    """What one GPU gives, by model."""
    return {name: run(tiny_models(name))[0] for name in MODELS}


@pytest.mark.parametrize("experts", [False, True], ids=["tensors", "experts"])
@pytest.mark.parametrize("name", MODELS)
def test_two_gpus_equal_one(tiny_models, one_gpu, name, experts):
    parallel = {"tensor_parallel_size": 2, "enable_expert_parallel": experts}
    got, workers = run(tiny_models(name), **parallel)
    want = one_gpu[name]
    assert workers == 2
    gaps = [gap(*pair) for pair in zip(got, want, strict=True)]
    parts = gaps[:COUNT], gaps[COUNT : 2 * COUNT], gaps[2 * COUNT :]
    planned, plain, pairs = parts
    parted = [sum(g.parted > 0 for g in part) for part in parts]
    log.info(
        "%s: largest gap %.1e planned, %.1e plain, %.1e of pairs; "
        "texts part %d, %d, %d of %d",
        *(name, *map(worst, parts), *parted, COUNT),
    )
    assert worst(planned) <= 4 * worst(plain)
    assert max(parted[:2]) <= COUNT // 10
    # (1 + beta) strong logits and beta weak ones, these under a plan; a rank that
    # combined other rows would part nearly all texts
    assert worst(pairs) <= 4 * (1 + 2 * BETA) * max(worst(planned), worst(plain))
    assert parted[2] <= COUNT // 2
