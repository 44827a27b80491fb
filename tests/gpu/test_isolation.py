# SPDX-License-Identifier: Apache-2.0
"""A request in a crowd, on a GPU, gives what it gives alone.

Stock vLLM on a GPU is not bit-exact across batches, in batch-invariant mode neither
(docs/log.md), so the bound comes from stock's own behaviour in the same engines: the
same crowd without plans. Float32 keeps it far below what another request's plan does,
which `test_a_leak_would_be_seen` shows.
"""

import logging
import random
from typing import NamedTuple

import numpy as np
import pytest
import torch

from moe_tta.vllm_plugin.rows import StepRows
from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.test_isolation import TOKENS, counters, draw_jobs, drive

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
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
    "additional_config": {"moe_tta": {"k_max": 12}},
}
CROWDED = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 64,
    "num_gpu_blocks_override": 40,
}


class Gap(NamedTuple):
    """How far a crowd's text is from the same request's alone."""

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


def crowd(llm, jobs, rng):
    """Drive the jobs; there must be preemptions and prefix hits, and nothing left."""
    before = counters(llm)
    results, aborted = drive(llm, jobs, rng)
    after = counters(llm)
    for name in ("vllm:num_preemptions", "vllm:prefix_cache_hits"):
        assert after[name] > before[name]
    assert len(results) + len(aborted) == len(jobs)
    assert aborted
    generate(llm, [jobs[0].prompt], [sampling(2)])
    found = status(llm)
    assert (found["requests_with_plan"], found["slots_in_use"]) == (0, 0)
    return results


def gaps(llm, jobs, results):
    """Compare every finished completion with the same request on its own."""
    found = []
    for index, result in results.items():
        job = jobs[index]
        (want,) = generate(llm, [job.prompt], [sampling(TOKENS, job.request)])
        found += [gap(outputs(result, c.index), want) for c in result.outputs]
    return found


def run(model, num_planned, num_plain, spoil=None):
    """Return the gaps of planned and of plain requests."""
    rng = random.Random(11)
    with engine(model, **GRAPHS, **CROWDED) as llm:
        shape = llm.llm_engine.input_processor.moe_tta.shape
        planned = draw_jobs(rng, shape, num_planned)
        plain = [
            job._replace(request=None, params=sampling(TOKENS))
            for job in draw_jobs(rng, shape, num_plain)
        ]
        plain_results = crowd(llm, plain, rng)
        if spoil is not None:
            spoil()
        planned_results = crowd(llm, planned, rng)
    with engine(model, **GRAPHS, enable_prefix_caching=False) as llm:
        return gaps(llm, planned, planned_results), gaps(llm, plain, plain_results)


def worst(found):
    return max(max(g.logprob, g.parted) for g in found)


def test_crowd_equals_solo(tiny_models):
    planned, plain = run(tiny_models("olmoe"), 2000, 300)
    log.info(
        "%d planned, %d plain; largest gap %.2e, %.2e; texts part %d, %d times",
        *(len(planned), len(plain), worst(planned), worst(plain)),
        *(sum(g.parted > 0 for g in found) for found in (planned, plain)),
    )
    # six times as many requests, plans that turn near ties into others
    assert worst(planned) <= 4 * worst(plain)
    assert worst(plain) < 1e-2


def test_a_leak_would_be_seen(tiny_models, monkeypatch):
    """Every tenth step, all rows obey their neighbour's slot."""
    original, steps = StepRows._fill, iter(range(10**9))

    def spoiled(self, runs, slots):
        original(self, runs, slots)
        if next(steps) % 10 == 0:
            end = runs[-1][1]
            self._slots[:end] = np.roll(self._slots[:end], 1)

    planned, plain = run(
        tiny_models("olmoe"),
        *(100, 60),
        spoil=lambda: monkeypatch.setattr(StepRows, "_fill", spoiled),
    )
    seen = sum(max(g.logprob, g.parted) > 4 * worst(plain) for g in planned)
    log.info("%d of %d completions show the leak", seen, len(planned))
    assert seen > len(planned) / 4
