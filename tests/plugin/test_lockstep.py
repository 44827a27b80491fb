# SPDX-License-Identifier: Apache-2.0
"""Random worlds: pairs never fall out of step, starve, or read what is not written."""

import random
from types import SimpleNamespace

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.request import RequestStatus

from tests.plugin.pair_world import VOCAB, World, next_token

NUM_WORLDS = 100
NUM_REQUESTS = 40


def make_world(rng, model, depth, v2, kind=World, **options):
    block_size = rng.choice([2, 4, 16])
    longest = rng.choice([24, 48])
    budget = rng.choice([8, 20, 64])
    config = EngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=longest,
        max_num_seqs=rng.choice([2, 3, 8]),
        max_num_batched_tokens=budget,
        enable_prefix_caching=True,
        scheduling_policy=rng.choice(["fcfs", "priority"]),
        async_scheduling=depth > 1,
        **options,
    ).create_engine_config()
    scheduler = config.scheduler_config
    scheduler.long_prefill_token_threshold = rng.choice([0, 0, 5])
    scheduler.scheduler_reserve_full_isl = rng.random() < 0.5
    scheduler.watermark = rng.choice([0.0, 0.0, 0.05])
    # from just enough for one pair to plenty
    enough = 2 * -(-longest // block_size) + 1
    num_blocks = int(enough * rng.choice([1, 1.3, 3])) + 1
    num_blocks += int(scheduler.watermark * num_blocks) + 1
    return kind(config, num_blocks, block_size, depth, v2), longest


def draw(rng, longest, prefixes):
    prompt = rng.choice(prefixes) + [
        rng.randrange(VOCAB) for _ in range(rng.randrange(0, 6))
    ]
    prompt = [*prompt, 1, 2][: longest - 2]
    salt = rng.choice([None, "x"])
    return {
        "prompt": prompt,
        "salt": salt,
        "pair": rng.choice([None, "weak", "weak", "x"]),
        "priority": rng.randrange(3),
        "arrival": rng.choice([1.0, 2.0, 3.0]),
        "max_tokens": rng.randrange(1, longest - len(prompt) + 1),
        "stop_token_ids": rng.sample(range(VOCAB), rng.choice([0, 0, 2])),
    }


def expected(request_id, asked):
    """Return what the request says alone."""
    tokens = []
    while len(tokens) < asked["max_tokens"]:
        tokens.append(next_token(request_id, len(asked["prompt"]) + len(tokens)))
        if tokens[-1] in asked["stop_token_ids"]:
            break
    return tokens


def live(rng, world, longest, draw=draw):
    """Let requests come and go at random until all have ended."""
    prefixes = [[rng.randrange(VOCAB) for _ in range(n)] for n in (0, 8, 16, longest)]
    todo = {f"r{i}": draw(rng, longest, prefixes) for i in range(NUM_REQUESTS)}
    waiting, idle = dict(todo), 0
    while waiting or world.scheduler.has_unfinished_requests():
        for _ in range(rng.choice([0, 0, 1, 4])):
            if waiting:
                request_id = next(iter(waiting))
                world.add(request_id, **waiting.pop(request_id))
        running = [r for r in world.answers if r not in world.ended]
        if running and rng.random() < 0.02:
            world.abort(rng.choice(running))
        if rng.random() < 0.01:
            world.scheduler.reset_prefix_cache(reset_running_requests=True)
        worked = world.step()
        idle = 0 if worked or not running else idle + 1
        assert idle < 20, "requests are waiting and nothing runs"
    world.drain()
    return todo


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("depth", [1, 2], ids=["plain", "async"])
def test_random_worlds(tiny_models, depth, v2):
    preempted = sampled = 0
    for seed in range(NUM_WORLDS):
        rng = random.Random(seed)
        world, longest = make_world(rng, tiny_models("mixtral"), depth, v2)
        preempt = world.scheduler._preempt_request

        def counted(request, *args, world=world, preempt=preempt, **kwargs):
            nonlocal preempted
            preempted += world.scheduler.pairs.follows(request.request_id)
            return preempt(request, *args, **kwargs)

        world.scheduler._preempt_request = counted
        todo = live(rng, world, longest)
        for request_id, asked in todo.items():
            want, got = expected(request_id, asked), world.answers[request_id]
            sampled += len(got)
            if world.ended[request_id] == "aborted":
                assert got == want[: len(got)], (seed, request_id)
            else:
                assert got == want, (seed, request_id, world.ended[request_id])
        scheduler = world.scheduler
        pool = scheduler.kv_cache_manager.block_pool
        assert scheduler.requests == {}
        assert len(scheduler.pairs) == 0
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
    assert preempted > NUM_WORLDS
    assert sampled > NUM_WORLDS * NUM_REQUESTS


def small_world(model, depth=1, v2=False, **scheduler):
    config = EngineArgs(
        model=model, skip_tokenizer_init=True, max_model_len=64, **scheduler
    ).create_engine_config()
    return World(config, num_blocks=40, block_size=4, depth=depth, v2=v2)


def ask(pair=None, prompt=(1, 2, 3, 4, 5), **params):
    """Return a request of the first priority, three tokens long."""
    given = {"salt": None, "priority": 0, "arrival": 1.0, "max_tokens": 3, **params}
    return {"prompt": list(prompt), "pair": pair, **given}


def test_a_pair_that_waits_for_its_grammar_lets_others_pass(tiny_models):
    world = small_world(tiny_models("mixtral"))
    world.add("a", **ask("weak"))
    lead = world.scheduler.requests["a"]
    lead.status = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
    lead.structured_output_request = SimpleNamespace(grammar=None)
    world.add("b", **ask())
    for _ in range(5):
        world.step()
    assert world.ended == {"b": "length"}
    lead.status = RequestStatus.WAITING
    lead.structured_output_request = None
    for _ in range(5):
        world.step()
    assert world.ended == {"b": "length", "a": "length"}
    assert len(world.answers["a"]) == 3


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("depth", [1, 2], ids=["plain", "async"])
@pytest.mark.parametrize("steps", range(5))
def test_a_killed_follower_ends_its_lead_only(tiny_models, depth, v2, steps):
    """Whenever it comes, with a step in flight or not."""
    options = {"async_scheduling": depth > 1}
    world = small_world(tiny_models("mixtral"), depth, v2, **options)
    world.add("a", **ask("weak", max_tokens=9))
    world.add("b", **ask("weak", max_tokens=9, prompt=range(6)))
    for _ in range(steps):
        world.step()
    world.scheduler.finish_requests("a+follower", RequestStatus.FINISHED_ABORTED)
    for _ in range(16):
        world.step()
    world.drain()
    assert world.ended == {"a": "error", "b": "length"}
    want = expected("a", ask("weak", max_tokens=9, stop_token_ids=[]))
    assert world.answers["a"] == want[: len(world.answers["a"])]
    assert len(world.answers["a"]) < 9
    pool = world.scheduler.kv_cache_manager.block_pool
    assert world.scheduler.requests == {}
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


@pytest.mark.parametrize(("seqs", "steps"), [(2, 8), (3, 8), (4, 4)])
def test_a_pair_counts_as_two(tiny_models, seqs, steps):
    """Two pairs of three tokens: one step for the prompts, three for the tokens."""
    world = small_world(tiny_models("mixtral"), max_num_seqs=seqs)
    world.add("a", **ask("weak"))
    world.add("b", **ask("weak", prompt=range(6)))
    taken = 0
    while len(world.ended) < 2:
        world.step()
        assert len(world.scheduler.running) in (0, 2, 4)
        assert len(world.scheduler.running) <= seqs
        taken += 1
    assert taken == steps
