# SPDX-License-Identifier: Apache-2.0
"""A request gives the same tokens alone and in any company."""

import random
from typing import Any, NamedTuple

import pytest

from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.requests import random_prompt, random_request

SEED = 20261122
NUM_REQUESTS = 200
TOKENS = 24
# float32 and no KV split: the one set-up in which stock vLLM on CPU is itself
# bit-exact across batching (docs/log.md)
EXACT = {"dtype": "float32", "max_model_len": 256, "block_size": 32}
CROWDED = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 48,
    "enable_chunked_prefill": True,
    "enable_prefix_caching": True,
    "num_gpu_blocks_override": 16,
    "additional_config": {"moe_tta": {"k_max": 6}},
}


class Job(NamedTuple):
    prompt: list[int]
    request: dict[str, Any] | None
    params: Any


def counters(llm):
    return {
        metric.name: metric.value
        for metric in llm.get_metrics()
        if hasattr(metric, "value")
    }


def drive(llm, jobs, rng):
    """Run jobs with random arrivals and aborts; return finished outputs by job."""
    core, waiting, results = llm.llm_engine, dict(enumerate(jobs)), {}
    running, aborted, leaving, step = set(), set(), {}, 0
    while waiting or core.has_unfinished_requests():
        for _ in range(rng.choice([0, 0, 1, 3])):
            if waiting:
                index = next(iter(waiting))
                job = waiting.pop(index)
                prompt = {"prompt_token_ids": job.prompt}
                core.add_request(str(index), prompt, job.params)
                running.add(index)
                if rng.random() < 0.15:
                    leaving[index] = step + rng.randrange(1, 20)
        for index in [
            i for i, when in leaving.items() if when <= step and i in running
        ]:
            core.abort_request([str(index)])
            running.discard(index)
            aborted.add(index)
        for output in core.step():
            if output.finished and int(output.request_id) in running:
                results[int(output.request_id)] = output
                running.discard(int(output.request_id))
        step += 1
    return results, aborted


@pytest.mark.parametrize("name", ["mixtral", "olmoe"])
def test_crowd_equals_solo(tiny_models, name):
    rng = random.Random(SEED)
    options = {**CROWDED}
    if name == "olmoe":
        options["additional_config"] = {"moe_tta": {"k_max": 12}}
    with engine(tiny_models(name), **EXACT, **options) as crowd:
        shape = crowd.llm_engine.input_processor.moe_tta.shape
        jobs = draw_jobs(rng, shape)
        results, aborted = run_crowd(crowd, jobs, rng)
    assert len(results) + len(aborted) == NUM_REQUESTS
    assert len(aborted) > 5
    solo = {"additional_config": options["additional_config"]}
    with engine(
        tiny_models(name), **EXACT, **solo, enable_prefix_caching=False
    ) as alone:
        differing = [
            (index, jobs[index].request)
            for index, result in results.items()
            if not equals_solo(alone, jobs[index], result)
        ]
    assert differing == []


def draw_jobs(rng, shape, count=NUM_REQUESTS):
    # vLLM takes n > 1 only with sampling; top_k 1 makes it greedy again but for ties
    twice = {"n": 2, "temperature": 1.0, "top_k": 1}
    prefixes = [[], *([rng.randrange(2, 256) for _ in range(64)] for _ in range(3))]
    jobs = []
    for _ in range(count):
        request = random_request(rng, shape)
        prompt = random_prompt(rng, prefixes)
        params = sampling(TOKENS, request, **rng.choice([{}, {}, {}, twice]))
        jobs.append(Job(prompt, request, params))
    return jobs


def run_crowd(llm, jobs, rng):
    """Drive the jobs; preemption and prefix hits must have happened."""
    before = counters(llm)
    results, aborted = drive(llm, jobs, rng)
    after = counters(llm)
    assert after["vllm:num_preemptions"] > before["vllm:num_preemptions"]
    assert after["vllm:prefix_cache_hits"] > before["vllm:prefix_cache_hits"]
    # the engine learns of the last finished request with its next step
    generate(llm, [jobs[0].prompt], [sampling(2)])
    assert status(llm)["requests_with_plan"] == 0
    assert status(llm)["slots_in_use"] == 0
    return results, aborted


def equals_solo(llm, job, result):
    (want,) = generate(llm, [job.prompt], [sampling(TOKENS, job.request)])
    return all(outputs(result, c.index) == want for c in result.outputs)
