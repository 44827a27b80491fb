# SPDX-License-Identifier: Apache-2.0
"""Random worlds: rows wait for their versions, and blocks keep them apart."""

import random
from functools import partial

import pytest
from vllm.v1.core.sched.interface import PauseState

from moe_tta.rounds import RequestRounds, Schedule, Work
from tests.plugin.round_world import RoundWorld
from tests.plugin.test_lockstep import draw, expected, live, make_world

BUDGET = 40
BATCH_TOKENS = 90


def options(batch_tokens):
    adapter = {"budget": BUDGET, "batch_tokens": batch_tokens}
    return {"additional_config": {"moe_tta": {"adapter": adapter}}}


def draw_schedule(rng, prompt_len):
    if rng.random() < 0.3:
        pairs, context = [], prompt_len
        for _ in range(rng.randrange(1, 4)):
            least = max(context - 1, pairs[-1][1] if pairs else 0)
            pairs.append((context, least + rng.randrange(4)))
            context += rng.randrange(1, 9)
        return Schedule(0, replay=tuple(pairs))
    return Schedule(rng.choice([0, 2, 3, 8]), rng.choice(["wait", "wait", "overlap"]))


def draw_work(rng, probes):
    passes = tuple(rng.choice([1, 2]) for _ in range(rng.randrange(1, 4)))
    if not probes:
        extra = rng.choice([0, 5])
        return Work("pretended", {"x": 1}, passes, extra, together=True)
    return Work("pretended", {"probes": passes}, passes, probes=True)


def draw_adapted(rng, longest, prefixes, probes=0.0):
    """Return a request as `draw` does, half of those without a partner with rounds.

    `prompt_tokens` may end the prompt earlier for the plans: then rows of several
    versions lie in what vLLM takes for the prompt.
    """
    asked = draw(rng, longest, prefixes)
    if rng.random() < 0.5:
        asked["pair"] = None
    if asked["pair"] is None and rng.random() < 0.7:
        length = len(asked["prompt"])
        prompt_len = rng.choice([length, length, rng.randrange(1, length + 1)])
        work = draw_work(rng, probes and rng.random() < probes)
        schedule = draw_schedule(rng, prompt_len)
        asked["rounds"] = RequestRounds(work, schedule, prompt_len, longest - 4)
    return asked


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("depth", [1, 2], ids=["plain", "async"])
@pytest.mark.parametrize(
    ("count", "batch_tokens"), [(60, 0), (20, BATCH_TOKENS)], ids=["alone", "batched"]
)
def test_random_worlds(tiny_models, count, batch_tokens, depth, v2):
    recomputed = rounds = batched = 0
    for seed in range(count):
        rng = random.Random(seed)
        model = tiny_models("mixtral")
        world, longest = make_world(
            rng, model, depth, v2, RoundWorld, **options(batch_tokens)
        )
        preempt = world.scheduler._preempt_request

        def counted(request, *args, world=world, preempt=preempt, **kwargs):
            nonlocal recomputed
            recomputed += bool(world.worker.starts[request.request_id])
            return preempt(request, *args, **kwargs)

        world.scheduler._preempt_request = counted
        todo = live(rng, world, longest, draw_adapted)
        check_texts(world, todo, seed)
        rounds += check_rounds(world, todo, seed)
        check_empty(world)
        check_budget(world, todo, batch_tokens)
        batched += sum(size > 1 for size in world.worker.batches)
    assert (batched > count) == (batch_tokens > 0)
    assert recomputed > count
    assert rounds > 10 * count


@pytest.mark.parametrize("v2", [False, True], ids=["v1", "v2"])
@pytest.mark.parametrize("depth", [1, 2], ids=["plain", "async"])
def test_random_worlds_of_probes(tiny_models, depth, v2):
    """Most rounds are done by probes, some by the adapter, in caches for one text."""
    count, rounds, probes, preempted, made_room = 40, 0, 0, 0, 0
    for seed in range(count):
        rng = random.Random(seed)
        model = tiny_models("mixtral")
        world, longest = make_world(rng, model, depth, v2, RoundWorld, **options(0))
        scheduler = world.scheduler
        preempt, make_room = scheduler._preempt_request, scheduler._make_room

        def counted(request, *args, world=world, preempt=preempt, **kwargs):
            nonlocal preempted
            preempted += request.request_id in world.scheduler._probes
            return preempt(request, *args, **kwargs)

        def counted_room(world=world, make_room=make_room):
            nonlocal made_room
            before = len(world.scheduler.running)
            make_room()
            made_room += before - len(world.scheduler.running)

        scheduler._preempt_request = counted
        scheduler._make_room = counted_room
        todo = live(rng, world, longest, partial(draw_adapted, probes=0.8))
        check_texts(world, todo, seed)
        rounds += check_rounds(world, todo, seed)
        check_empty(world)
        assert not scheduler._probes
        assert not scheduler._edits
        assert scheduler._round is None
        probes += world.worker.probes
    assert probes > rounds > 10 * count
    assert preempted > count
    assert made_room > 5  # without it, requests wait for each other for ever


@pytest.mark.parametrize("depth", [1, 2], ids=["plain", "async"])
def test_paused_worlds_drain(tiny_models, depth):
    """Where new requests must wait, those that run still get their rounds."""

    def roomy(config, num_blocks, *rest):
        config.scheduler_config.max_num_seqs = 64
        return RoundWorld(config, 1000, *rest)

    ran = 0
    for seed in range(12):
        rng = random.Random(seed)
        model = tiny_models("mixtral")
        world, longest = make_world(rng, model, depth, False, roomy, **options(0))
        scheduler, steps = world.scheduler, 0
        todo = {f"r{i}": draw_adapted(rng, longest, [[]], 0.9) for i in range(20)}
        for name, asked in todo.items():
            world.add(name, **asked)
        for _ in range(rng.randrange(3, 40)):
            world.step()
        scheduler.set_pause_state(PauseState.PAUSED_NEW)
        running = [r for r in scheduler.running if r.request_id in scheduler.rounds]
        while scheduler.get_num_unfinished_requests():
            world.step()
            steps += 1
            assert steps < 2000, "a paused engine does not come to rest"
        assert all(request.is_finished() for request in running)
        ran += len(running)
        scheduler.set_pause_state(PauseState.UNPAUSED)
        while scheduler.has_unfinished_requests():
            world.step()
        world.drain()
        check_texts(world, todo, seed)
        check_empty(world)
    assert ran > 12


def check_texts(world, todo, seed):
    for request_id, asked in todo.items():
        want, got = expected(request_id, asked), world.answers[request_id]
        if world.ended[request_id] == "aborted":
            assert got == want[: len(got)], (seed, request_id)
        else:
            assert got == want, (seed, request_id, world.ended[request_id])


def check_rounds(world, todo, seed):
    """Every round whose row was computed has taken place, when nothing overlapped."""
    total = 0
    for request_id, asked in todo.items():
        rounds = asked.get("rounds")
        starts = world.worker.starts[request_id]
        total += len(starts)
        if rounds is None or world.ended[request_id] == "aborted":
            continue
        assert starts == sorted(starts)
        if rounds.schedule.mode == "overlap":
            continue
        last_row = len(asked["prompt"]) + len(world.answers[request_id]) - 2
        number = 0
        while (found := rounds.round(number)) and found.start <= last_row:
            assert starts[number] == found.start, (seed, request_id)
            number += 1
    return total


def check_empty(world):
    scheduler = world.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    assert scheduler.requests == {}
    assert len(scheduler.rounds) == 0
    assert not scheduler.rounds._due
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def check_budget(world, todo, batch_tokens):
    """Beside rows, the adapter never reads more than its budget and a unit's rest."""
    rounds = [asked["rounds"] for asked in todo.values() if "rounds" in asked]
    dearest = max((r.work.cost(0, r.max_context) * 2 for r in rounds), default=0)
    # of a batch: two passes, and a text of one token may have 5 more beside it
    dearest = max(dearest, 2 * (1 + 5) * batch_tokens)
    busy = [spent for spent, rows in world.worker.cost if rows]
    assert sum(busy) <= BUDGET * len(busy)
    assert max(busy, default=0) <= BUDGET + dearest
