# SPDX-License-Identifier: Apache-2.0
"""Pairs in a crowd: the tokens of each alone, and nothing left behind."""

import random

import pytest

from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.test_isolation import CROWDED, EXACT, Job, counters, drive
from tests.requests import random_prompt, random_request

SEED = 20261123
NUM_REQUESTS = 300
TOKENS = 20
WEAK = [{"rank": 2}, {"k": 1}, {"rank": 3, "renorm": "always"}]
# vLLM takes n > 1 only with sampling; top_k 1 makes it greedy again
SAMPLING = [
    {},
    {"n": 2, "temperature": 1.0, "top_k": 1},
    {"temperature": 0.8, "seed": 7},
    {"temperature": 1.2, "seed": 8, "min_p": 0.05, "top_p": 0.9},
    {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "min_tokens": 6},
    {"allowed_token_ids": list(range(100, 140)), "logit_bias": {110: 2.0}},
]


def draw_job(rng, shape, prefixes):
    request = random_request(rng, shape)
    options = dict(rng.choice(SAMPLING))
    if rng.random() < 1 / 3:
        weak = rng.choice(WEAK) if rng.random() < 0.7 else request or {}
        strong = rng.choice([{}, {}, {"dynamic_k": {"k": 3}}])
        beta = rng.choice([0.3, 0.5, 2.0])
        request = {"contrast": {"weak": weak, "strong": strong, "beta": beta}}
    if rng.random() < 0.3:
        options["stop_token_ids"] = rng.sample(range(256), 12)
    if rng.random() < 0.3:
        options["ignore_eos"] = False
    # a follower with tokens of its own would show here
    prompt = random_prompt(rng, prefixes)
    return Job(prompt, request, sampling(rng.randrange(6, TOKENS), request, **options))


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def check_empty(llm):
    """No request, pair, slot or block is left once the last one has finished."""
    # the worker learns of the last finished request with its next step
    generate(llm, [[3, 4, 5]], [sampling(2)])
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    assert scheduler.requests == {}
    assert len(scheduler.pairs) == 0
    assert not scheduler.running
    assert not scheduler.waiting
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    held = status(llm)
    assert (held["pairs"], held["requests_with_plan"], held["slots_in_use"]) == (0,) * 3


# asynchronous scheduling is off on CPU: tests/plugin/test_lockstep.py has it
@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_crowd_equals_solo(tiny_models, policy):
    options = {"scheduling_policy": policy}
    rng = random.Random(SEED)
    with engine(tiny_models("mixtral"), **EXACT, **CROWDED, **options) as crowd:
        shape = crowd.llm_engine.input_processor.moe_tta.shape
        prefixes = [[], *([rng.randrange(2, 256) for _ in range(64)] for _ in range(3))]
        jobs = [draw_job(rng, shape, prefixes) for _ in range(NUM_REQUESTS)]
        before = counters(crowd)
        preempted = count_preempted_followers(crowd)
        results, aborted = drive(crowd, jobs, rng)
        after = counters(crowd)
        counted_preemptions = scheduler_of(crowd)._preempted_pairs
        check_empty(crowd)
    assert len(preempted) > 5
    assert counted_preemptions == len(preempted)
    assert len(results) + len(aborted) == NUM_REQUESTS
    assert len(aborted) > 5
    for counted in ("vllm:num_preemptions", "vllm:prefix_cache_hits"):
        assert after[counted] > before[counted]
    check_counters(before, after, results)
    wide = {"additional_config": CROWDED["additional_config"]}
    with engine(
        tiny_models("mixtral"), **EXACT, **wide, enable_prefix_caching=False
    ) as alone:
        assert differing(alone, jobs, results) == []


def count_preempted_followers(llm):
    """Return a list that grows by the id of each follower that is preempted."""
    scheduler, found = scheduler_of(llm), []
    preempt = scheduler._preempt_request

    def counted(request, *args, **kwargs):
        if scheduler.pairs.follows(request.request_id):
            found.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return found


def check_counters(before, after, results):
    """Usage and metrics know nothing of followers."""
    finished = sum(len(r.outputs) for r in results.values())
    tokens = sum(len(c.token_ids) for r in results.values() for c in r.outputs)
    grown = {name: after[name] - before[name] for name in after if name in before}
    # aborted requests have generated tokens too
    assert grown["vllm:generation_tokens"] >= tokens
    assert grown["vllm:generation_tokens"] < 1.3 * tokens
    assert after["vllm:num_requests_running"] == 0
    assert finished > 0


def differing(llm, jobs, results):
    """Return the jobs whose tokens or logprobs differ from themselves alone."""
    found = []
    for index, result in results.items():
        job = jobs[index]
        (want,) = llm.generate(
            [{"prompt_token_ids": job.prompt}], [job.params], use_tqdm=False
        )
        for completion in result.outputs:
            mine = outputs(result, completion.index)
            if mine != outputs(want, completion.index):
                found.append((index, job.request, job.params))
    return found
