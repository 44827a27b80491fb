# SPDX-License-Identifier: Apache-2.0
"""Requests in a crowd, on a GPU: each row obeys its own plan, and texts are as alone.

With VLLM_BATCH_INVARIANT=1 stock vLLM gives the same bits in any batch, as long as a
token is computed in the same way: not once in a chunk and once by itself, which
chunked prefill and preemption do (docs/log.md). `test_exact` leaves those two out and
demands equal texts; n = 2 too, since that samples among equal bfloat16 logits.
`test_every_row` has everything happen and demands equal routing,
row by row (tests/plugin/audit.py).
"""

import logging
import os
import random

import pytest
import torch

from tests.plugin.engine import engine, generate, outputs, sampling
from tests.plugin.gpu_audit import audited
from tests.plugin.test_isolation import TOKENS, counters, draw_jobs, drive

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
COUNT = 2000
K_MAX = {"mixtral": 6, "olmoe": 12}
log = logging.getLogger(__name__)
GRAPHS = {
    "enforce_eager": False,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2**28,
    "dtype": "float32",
    "max_model_len": 256,
    "compilation_config": {  # full graphs, without the time of compiling
        "mode": 0,
        "cudagraph_mode": "FULL_DECODE_ONLY",
        "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
    },
}
CROWDED = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 40,
}


def solo(llm, job):
    return generate(llm, [job.prompt], [sampling(TOKENS, job.request)])


@pytest.mark.skipif(
    os.environ.get("VLLM_BATCH_INVARIANT") != "1",
    reason="bits are comparable across batches in vLLM's batch-invariant mode only",
)
@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_exact(tiny_models, name):
    """Mixed batches, aborts and reused slots; whole prompts, no preemption."""
    rng = random.Random(12)
    k_max = {"moe_tta": {"k_max": K_MAX[name]}}
    options = {**GRAPHS, "dtype": "bfloat16", "additional_config": k_max}
    options["enable_prefix_caching"] = False
    model = tiny_models(name)
    with engine(model, **options, max_num_seqs=8) as llm:
        shape = llm.llm_engine.input_processor.moe_tta.shape
        jobs = draw_jobs(rng, shape, COUNT, other={})
        results, _ = drive(llm, jobs, rng)
        preempted = counters(llm)["vllm:num_preemptions"]
    assert preempted == 0
    with engine(model, **options) as llm:
        equal = [
            outputs(result, completion.index) == alone
            for index, result in results.items()
            for alone in solo(llm, jobs[index])
            for completion in result.outputs
        ]
    log.info("%s: %d completions, %d differ", name, len(equal), equal.count(False))
    assert all(equal)


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_every_row(tiny_models, name):
    options = {**GRAPHS, **CROWDED}
    options["additional_config"] = {"moe_tta": {"k_max": K_MAX[name]}}
    found = audited(tiny_models(name), COUNT, TOKENS, options)
    log.info("%s: %s", name, found)
    assert found["finished"] + found["aborted"] == COUNT
    for what in ("aborted", "chunks", "preemptions", "prefix_hits"):
        assert found[what] > 20
    assert found["layers"] == 4
    assert found["planned_rows"] > found["rows"] / 2
    assert found["wrong"] == 0


def test_a_leak_would_be_seen(tiny_models):
    """Every fifth step, all rows obey their neighbours' slots."""
    options = {**GRAPHS, **CROWDED}
    options["additional_config"] = {"moe_tta": {"k_max": K_MAX["olmoe"]}}
    found = audited(tiny_models("olmoe"), 60, TOKENS, options, spoil=True)
    log.info("%s", found)
    assert found["wrong"] > found["rows"] / 50
