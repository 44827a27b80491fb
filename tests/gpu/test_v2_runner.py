# SPDX-License-Identifier: Apache-2.0
"""On a GPU: Model Runner V2, full CUDA graphs, asynchronous scheduling.

Needs vLLM 0.32.x and one CUDA device; `python -m pytest tests/gpu` runs all of them.
"""

import logging
import random

import pytest
import torch

from tests.plugin.engine import engine, generate, sampling, status
from tests.plugin.stock import run_stock, run_stocks
from tests.requests import random_prompt, random_request

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
log = logging.getLogger(__name__)
MODELS = ["mixtral", "olmoe", "qwen3_moe"]
GRAPHS = {
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2**28,
    "dtype": "bfloat16",
    # not compiled: Inductor picks kernels by time, so that two processes of one vLLM
    # may round differently
    "compilation_config": {
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
}
PROMPT = list(range(2, 132))


def prompts(count, seed=7):
    rng = random.Random(seed)
    return [
        [rng.randrange(2, 256) for _ in range(rng.randrange(4, 80))]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def stock(tiny_models, tmp_path_factory):
    """What stock vLLM generates, by model: one process for all."""
    folder, models = tmp_path_factory.mktemp("stock"), list(map(tiny_models, MODELS))
    found = run_stocks(models, prompts(12), {"tokens": 24}, folder, engine=GRAPHS)
    return dict(zip(MODELS, found, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_neutral_is_stock(tiny_models, stock, name):
    with engine(tiny_models(name), **GRAPHS) as llm:
        assert status(llm)["armed_layers"] == [0, 1, 2, 3]
        config = llm.llm_engine.vllm_config
        assert config.use_v2_model_runner
        plain = generate(llm, prompts(12), [sampling(24)] * 12)
        empty = generate(llm, prompts(12), [sampling(24, {})] * 12)
    assert plain == stock[name]
    assert empty == stock[name]


@pytest.mark.parametrize("name", MODELS)
def test_replica(tiny_models, name):
    from tests.plugin.test_replica import check

    wide = {"moe_tta": {"k_max": 6 if name != "olmoe" else 12}}
    check(tiny_models(name), torch.bfloat16, wide, vocab=256, options=GRAPHS)


def test_fp8_experts(tiny_models, tmp_path):
    """Quantised when loading: neutral is stock, and a plan changes the text.

    One scale spans all rows of a step, so a graph's padding would count in stock, too:
    as many requests as a graph has rows.
    """
    fp8 = {**GRAPHS, "quantization": "fp8"}
    model, asked = tiny_models("mixtral"), prompts(16)
    want = run_stock(model, asked, {"tokens": 24}, tmp_path, engine=fp8)
    with engine(model, **fp8) as llm:
        log.info("fp8 experts skip unused columns: %s", status(llm)["skips_unused"])
        assert generate(llm, asked, [sampling(24)] * 16) == want
        half = generate(llm, asked, [sampling(24, {"dynamic_k": {"k": 1}})] * 16)
    assert all(ours[0] != theirs[0] for ours, theirs in zip(half, want, strict=True))


def test_prefix_cache(tiny_models):
    plans = [{"steer": {"demote": [[0, 1]]}}, {"dynamic_k": {"k": 1}}, None]
    with engine(tiny_models("mixtral"), **GRAPHS, enable_prefix_caching=True) as llm:
        found = []
        for plan in plans * 2:
            (output,) = llm.generate(
                [{"prompt_token_ids": PROMPT}], sampling(2, plan), use_tqdm=False
            )
            found.append(output.num_cached_tokens)
    assert found == [0, 0, 0, 128, 128, 128]


def test_requests_leave_nothing(tiny_models):
    rng = random.Random(5)
    with engine(tiny_models("mixtral"), **GRAPHS) as llm:
        shape = llm.llm_engine.input_processor.moe_tta.shape
        asked = [random_prompt(rng, [[]]) for _ in range(40)]
        params = [sampling(8, random_request(rng, shape)) for _ in asked]
        assert len(generate(llm, asked, params)) == 40
        generate(llm, [PROMPT], [sampling(2)])
        found = status(llm)
    assert (found["requests_with_plan"], found["slots_in_use"]) == (0, 0)
