# SPDX-License-Identifier: Apache-2.0
"""Adapted requests in a crowd: the tokens of each alone, and nothing left behind."""

import random

import pytest

from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.test_contrast_crowd import SAMPLING
from tests.plugin.test_isolation import CROWDED, EXACT, Job, counters, drive
from tests.requests import random_prompt, random_request

SEED = 20261124
NUM_REQUESTS = 90
TOKENS = 24


def settings(budget):
    adapter = {"budget": budget, "max_context": 100}
    return {"additional_config": {"moe_tta": {"k_max": 6, "adapter": adapter}}}


pytestmark = pytest.mark.usefixtures("one_thread")


def draw_job(rng, shape, prefixes):
    request = random_request(rng, shape)
    options = dict(rng.choice(SAMPLING))
    kind = rng.random()
    prompt = rng.choice(prefixes) + random_prompt(rng, [[]])
    if kind < 0.5:
        every, mode = rng.choice([0, 8, 8, 16]), rng.choice(["wait", "wait", "overlap"])
        how = rng.choice([{"share": 0.3}, {"optimizer": "spsa", "layers": [1, 3]}])
        rounds = {"every": every, "mode": mode, "steps": 1, "lr": 0.5, **how}
        request = {**(request or {}), "reroute": rounds}
        prompt = prompt[:90]
    elif kind < 0.6:
        request = {"contrast": {"weak": {"rank": 2}}}
    if rng.random() < 0.3:
        options["ignore_eos"] = False
    return Job(prompt, request, sampling(rng.randrange(6, TOKENS), request, **options))


def scheduler_of(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def check_empty(llm):
    """No request, round, job, version, slot or block is left."""
    # the worker learns of the last finished request with its next step
    generate(llm, [[3, 4, 5]], [sampling(2)])
    scheduler = scheduler_of(llm)
    pool = scheduler.kv_cache_manager.block_pool
    assert scheduler.requests == {}
    assert len(scheduler.rounds) == 0
    assert not scheduler.rounds._due
    assert not scheduler._probes
    assert not scheduler._edits
    assert not scheduler._reports
    assert not scheduler.running
    assert not scheduler.waiting
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    held = status(llm)
    names = ("jobs", "pairs", "requests_with_plan", "slots_in_use")
    assert [held[name] for name in names] == [0] * 4


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_crowd_equals_solo(tiny_models, policy):
    rng = random.Random(SEED)
    options = {**CROWDED, **settings(500), "scheduling_policy": policy}
    options["num_gpu_blocks_override"] = 12
    with engine(tiny_models("mixtral"), **EXACT, **options) as crowd:
        shape = crowd.llm_engine.input_processor.moe_tta.shape
        prefixes = [[], *([rng.randrange(2, 256) for _ in range(64)] for _ in range(2))]
        jobs = [draw_job(rng, shape, prefixes) for _ in range(NUM_REQUESTS)]
        before = counters(crowd)
        preempted = count_preempted_adapted(crowd)
        results, aborted = drive(crowd, jobs, rng)
        after = counters(crowd)
        check_empty(crowd)
    assert len(results) + len(aborted) == NUM_REQUESTS
    assert len(aborted) > 3
    assert len(preempted) > 3
    assert after["vllm:prefix_cache_hits"] > before["vllm:prefix_cache_hits"]
    check_reports(jobs, results)
    with engine(
        tiny_models("mixtral"), **EXACT, **settings(10**6), enable_prefix_caching=False
    ) as alone:
        assert differing(alone, jobs, results) == []


def count_preempted_adapted(llm):
    """Return a list that grows by each preempted request that has a version."""
    scheduler, found = scheduler_of(llm), []
    preempt = scheduler._preempt_request

    def counted(request, *args, **kwargs):
        progress = scheduler.rounds._of.get(request.request_id)
        if progress is not None and progress.starts:
            found.append(request.request_id)
        return preempt(request, *args, **kwargs)

    scheduler._preempt_request = counted
    return found


def check_reports(jobs, results):
    """Every round that was due by the request's end is reported, and only those."""
    rounds = 0
    for index, result in results.items():
        asked = (jobs[index].request or {}).get("reroute")
        for completion in result.outputs:
            if asked is None:
                assert completion.moe_tta is None
            elif asked["mode"] == "wait":
                length, count = len(jobs[index].prompt), len(completion.token_ids)
                contexts = range(length, length + count, asked["every"] or 10**6)
                found = [r["context"] for r in done_rounds(completion)]
                assert found == [c for c in contexts if c <= 100]
                rounds += len(found)
    assert rounds > NUM_REQUESTS / 3


def differing(llm, jobs, results):
    """Return the jobs whose tokens or logprobs differ from themselves alone.

    What overlapped is run again by its report.
    """
    found, replayed = [], 0
    for index, result in results.items():
        job = jobs[index]
        for completion in result.outputs:
            params, rounds = job.params, (job.request or {}).get("reroute")
            if rounds is not None and rounds["mode"] == "overlap":
                params = replay(job, completion)
                replayed += 1
            (want,) = llm.generate(
                [{"prompt_token_ids": job.prompt}], [params], use_tqdm=False
            )
            place = completion.index if params is job.params else 0
            if outputs(result, completion.index) != outputs(want, place):
                found.append((index, job.request, completion.moe_tta))
    assert replayed > 3
    return found


def done_rounds(completion):
    """Return the reports of rounds that took place: not of a text too long."""
    reports = (completion.moe_tta or {"rounds": []})["rounds"]
    return [report for report in reports if report["start"] is not None]


def replay(job, completion):
    """Return parameters that repeat a completion's recorded rounds."""
    request = {k: v for k, v in job.request.items() if k != "reroute"}
    asked = {
        k: v for k, v in job.request["reroute"].items() if k not in ("every", "mode")
    }
    if done := done_rounds(completion):
        pairs = [[r["context"], r["start"]] for r in done]
        request["reroute"] = {**asked, "replay": pairs}
    params = job.params.clone()
    params.n = 1
    params.extra_args = {"moe_tta": request} if request else None
    return params
