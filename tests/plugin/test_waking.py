# SPDX-License-Identifier: Apache-2.0
"""Schedulers are vLLM's own, request by request, until one needs a pair or rounds."""

import random

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from moe_tta.vllm_plugin.waking import PER_REQUEST
from tests.plugin.test_lockstep import make_world


@pytest.fixture
def world(tiny_models):
    return make_world(random.Random(0), tiny_models("mixtral"), 1, False)[0]


def add(world, name, pair):
    world.add(name, [5, 6, 7], None, pair, 0, 0.0, max_tokens=2)


def used(scheduler):
    """Return the functions that vLLM's loop calls for each request."""
    manager = scheduler.kv_cache_manager
    hooked = manager.allocate_slots, manager.record_prefix_cache_stats
    return [*(getattr(scheduler, name).__func__ for name in PER_REQUEST)], hooked


def test_the_first_pair_wakes_the_mix_ins(world):
    scheduler = world.scheduler
    vllms = [getattr(Scheduler, name) for name in PER_REQUEST]
    ours = [getattr(type(scheduler), name) for name in PER_REQUEST]
    assert not set(vllms) & set(ours)
    asleep = used(scheduler)
    assert asleep[0] == vllms
    add(world, "plain", pair=None)
    assert used(scheduler) == asleep
    add(world, "paired", pair="salt")
    functions, hooked = used(scheduler)
    assert functions == ours
    assert not set(hooked) & set(asleep[1])
    add(world, "again", pair="salt")  # nothing is hooked twice
    assert used(scheduler) == (functions, hooked)
