# SPDX-License-Identifier: Apache-2.0
"""The random requests of the other tests are valid on every family."""

import random
from dataclasses import replace

import pytest

from moe_tta.compile import compile_request
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext
from tests.families import CASES
from tests.requests import random_request


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_compile(case):
    shape = replace(case.shape, k_max=case.k_max)
    for seed in range(200):
        request = random_request(random.Random(seed), shape) or {}
        compile_request(parse(request, presets={}), PlanContext(shape))
