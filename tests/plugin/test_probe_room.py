# SPDX-License-Identifier: Apache-2.0
"""Rounds by probes where room is short, and where the worker is another process."""

import random

import pytest

from tests.plugin.engine import engine, generate, sampling, status
from tests.plugin.test_probes import EXACT, ROUNDS, SPSA
from tests.plugin.test_reroute import draw_prompts
from tests.plugin.test_reroute_crowd import check_empty

PROMPTS = draw_prompts(6, random.Random(11))
LESS = {"reroute": {**SPSA, "every": 16}}
PARAMS = [
    sampling(40, request) for request in (ROUNDS, None, ROUNDS, LESS, ROUNDS, None)
]


@pytest.fixture(scope="module")
def roomy(tiny_models):
    """What each request says where there is room for all."""
    with engine(tiny_models("mixtral"), **EXACT) as llm:
        return generate(llm, PROMPTS, PARAMS)


@pytest.mark.parametrize("places", [1, 3])
def test_hardly_any_room(tiny_models, roomy, places):
    """Blocks for one text of the longest, or one place: everybody ends as ever."""
    little = {"num_gpu_blocks_override": 8, "max_num_seqs": places}
    with engine(tiny_models("mixtral"), **EXACT, **little) as llm:
        assert generate(llm, PROMPTS, PARAMS) == roomy
        check_empty(llm)


def test_a_worker_of_another_process(tiny_models, roomy):
    """Orders cross processes, as with tensor parallelism, which CPUs do not have."""
    apart = {"distributed_executor_backend": "mp"}
    with engine(tiny_models("mixtral"), **EXACT, **apart) as llm:
        assert generate(llm, PROMPTS, PARAMS) == roomy
        generate(llm, [[3, 4, 5]], [sampling(2)])
        assert status(llm)["requests_with_plan"] == 0
