# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel against the law; `test_triton.py` runs this in a process.

On a machine without a GPU the process needs TRITON_INTERPRET=1 from its start.
"""

import math
from itertools import product

import numpy as np
import pytest
import torch

from moe_tta.kernels.reference import RoutingRule, route
from moe_tta.kernels.route import route_triton
from moe_tta.kernels.table import LayerTable
from moe_tta.plan import RoutingPlan, Select
from tests.kernels.cases import U, make_plan, make_shape, make_table
from tests.kernels.drawing import (
    LAYERS,
    ROUTERS,
    grid,
    make_any_plan,
    make_any_shape,
)
from tests.kernels.oracle import Row

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXPERTS, TOP_KS, ROWS = (8, 60, 64, 128), (1, 2, 8), (0, 1, 7, 33)
GRID = list(product(ROUTERS, EXPERTS))


def rtol(num_experts):
    """Each side sums at most 2 * E terms and rounds fewer than 64 times besides."""
    return 2 * (2 * num_experts + 64) * U


@pytest.fixture(autouse=True)
def poison():
    """Make fresh outputs NaN and the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(logits, slots, positions, table, rule, width, layer=LAYERS[1]):
    """Return the law's routing, computed on CPU, and the kernel's."""
    law = route(logits, slots, positions, table, rule, width, layer)
    rule = RoutingRule(**vars(rule))
    if rule.correction_bias is not None:
        vars(rule)["correction_bias"] = rule.correction_bias.to(DEVICE)
    table = LayerTable(*(tensor.to(DEVICE) for tensor in table))
    rows = (tensor.to(DEVICE) for tensor in (logits, slots, positions))
    result = route_triton(*rows, table, rule, width, layer)
    return law, type(law)(*(tensor.cpu() for tensor in result))


def make_world(seed, router, num_experts):
    rng = np.random.default_rng(seed)
    _, biased, groups, topk_group, _ = router
    top_k = min(int(rng.choice(TOP_KS)), num_experts // groups * topk_group)
    shape = make_any_shape(rng, router, num_experts, top_k)
    plans = [RoutingPlan(), *(make_any_plan(rng, shape) for _ in range(12))]
    bias = torch.from_numpy(grid(rng, num_experts, 1)) if biased else None
    return rng, shape, plans, RoutingRule.from_shape(shape, bias)


def make_rows(rng, num_experts, num_slots):
    """Return logits with columns to ignore and gaps between rows, slots, positions."""
    num_rows = int(rng.choice(ROWS, p=[0.05, 0.05, 0.75, 0.15]))
    size = (num_rows, num_experts + int(rng.integers(0, 5)))
    logits = torch.from_numpy(grid(rng, size, 4))  # many exact ties
    if rng.random() < 0.5:
        logits = torch.from_numpy(rng.normal(0, 3, size).astype(np.float32))
    logits = logits.to((torch.float32, torch.bfloat16)[rng.integers(2)])
    apart = int(rng.integers(1, 4))
    logits = logits.repeat_interleave(apart, dim=0)[::apart]
    slots = rng.integers(0, num_slots, num_rows)
    return (
        logits,
        torch.from_numpy(slots.astype((np.int32, np.int64)[rng.integers(2)])),
        torch.from_numpy(rng.integers(0, 2**40, num_rows)),
    )


@pytest.mark.parametrize("seed", range(2 * len(GRID)))
def test_equals_the_law(seed):
    router, num_experts = GRID[seed % len(GRID)]
    rng, shape, plans, rule = make_world(seed, router, num_experts)
    logits, slots, positions = make_rows(rng, num_experts, len(plans))
    table = make_table(shape, *plans[1:]).layer(1)
    law, result = both(logits, slots, positions, table, rule, shape.k_max)
    assert result.topk_ids.dtype == torch.int32
    assert result.topk_weights.dtype == torch.float32
    assert result.topk_ids.shape == law.topk_ids.shape
    excused = 0
    for index in range(len(logits)):
        if not torch.equal(result.topk_ids[index], law.topk_ids[index]):
            # only where float32 cannot decide, says the loop oracle
            row = logits[index, :num_experts], plans[slots[index]], 1, rule
            place = shape.k_max, LAYERS[1], int(positions[index])
            assert Row(*row, *place).unsure, f"row {index}: {result} {law}"
            excused += 1
            continue
        torch.testing.assert_close(
            result.topk_weights[index],
            law.topk_weights[index],
            rtol=rtol(num_experts),
            atol=0,
        )
    assert excused <= 1


SELECTIONS = {
    "model": {},
    "top_k": {"select": Select.TOP_K, "select_args": [0, 0, 0]},
    "top_p": {"select": Select.TOP_P, "select_args": [0.3, 0, 0]},
    "relative": {"select": Select.RELATIVE, "select_args": [1, 0, 0]},
    "absolute": {"select": Select.ABSOLUTE, "select_args": [1 / 16, 0, 0]},
    "entropy": {"select": Select.ENTROPY, "select_args": [0.5, 0.9, 0]},
    "ranks": {"select": Select.RANKS, "select_args": [3, 0, 0]},
    "sample": {"select": Select.SAMPLE, "select_args": [1, 8, 0.5], "seed": -3},
}


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("name", SELECTIONS)
def test_ties_go_to_the_lowest_id(name, scoring):
    shape = make_shape(num_experts=16, top_k=4, k_max=6, scoring=scoring)
    fields = SELECTIONS[name] and {"k_min": 2, "k_max": 5, **SELECTIONS[name]}
    # a sum of two zeros is -0 only if both are
    table = make_table(shape, make_plan(bias=[-0.0] * 16, **fields)).layer(0)
    logits = torch.zeros(3, 16)
    logits[1, 9:] = 1.0
    logits[2, ::2] = -0.0
    slots, positions = torch.ones(3, dtype=torch.int32), torch.arange(3)
    law, result = both(
        logits, slots, positions, table, RoutingRule.from_shape(shape), 6
    )
    assert torch.equal(result.topk_ids, law.topk_ids)
    torch.testing.assert_close(
        result.topk_weights, law.topk_weights, rtol=rtol(16), atol=0
    )


@pytest.mark.parametrize("num_experts", [160, 512])
def test_many_experts(num_experts):
    shape = make_shape(num_experts, top_k=8, k_max=32)
    every = [
        make_plan(**({"k_max": 32, **fields} if fields else {}))
        for fields in SELECTIONS.values()
    ]
    rows = torch.from_numpy(grid(np.random.default_rng(0), (8, num_experts), 4))
    slots, positions = torch.arange(1, 9), torch.arange(8)
    table, rule = make_table(shape, *every).layer(0), RoutingRule.from_shape(shape)
    law, result = both(rows, slots, positions, table, rule, 32)
    assert torch.equal(result.topk_ids, law.topk_ids)
    torch.testing.assert_close(
        result.topk_weights, law.topk_weights, rtol=rtol(num_experts), atol=0
    )


@pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus"])
def test_scores_far_from_zero(scoring):
    shape = make_shape(8, 8, 8, scoring=scoring, renormalize=False)
    logits = torch.tensor([[-80.0, -40, -17, -1e-3, 0, 17, 40, 80]])
    rows = logits, torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    rule = RoutingRule.from_shape(shape)
    law, result = both(*rows, make_table(shape).layer(0), rule, 8)
    assert torch.equal(result.topk_ids, law.topk_ids)
    torch.testing.assert_close(
        result.topk_weights, law.topk_weights, rtol=rtol(8), atol=0
    )


NAN_ROWS = torch.zeros(3, 8)
NAN_ROWS[0, 2], NAN_ROWS[1], NAN_ROWS[2] = math.nan, math.nan, -math.inf


def test_rows_without_numbers_stay_in_range():
    shape = make_shape(num_experts=8, top_k=3, k_max=4)
    table = make_table(shape, make_plan(bias=np.zeros(8))).layer(0)
    rows = NAN_ROWS, torch.ones(3, dtype=torch.int32), torch.arange(3)
    law, result = both(*rows, table, RoutingRule.from_shape(shape), 4)
    assert torch.equal(result.topk_ids, law.topk_ids)


def call(**changed):
    shape = make_shape(num_experts=8)
    args = {
        "router_logits": torch.zeros(2, 8),
        "slots": torch.zeros(2, dtype=torch.int32),
        "positions": torch.zeros(2, dtype=torch.int64),
        "table": make_table(shape).layer(0),
        "rule": RoutingRule.from_shape(shape),
        "width": 4,
        "layer": 0,
    }
    return route_triton(**{**args, **changed})


TABLE = make_table(make_shape(num_experts=8)).layer(0)
UNALIGNED = torch.zeros(2, TABLE.packed.shape[1] + 8, dtype=torch.uint8)[:, 8:]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"router_logits": torch.zeros(2, 7)}, "router_logits"),
        ({"router_logits": torch.zeros(2, 8, dtype=torch.int32)}, "router_logits"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, "slots"),
        ({"slots": torch.zeros(2)}, "slots"),
        ({"positions": torch.zeros(2, dtype=torch.int32)}, "positions"),
        ({"positions": torch.zeros(4, dtype=torch.int64)[::2]}, "positions"),
        ({"width": 1}, "width"),
        ({"width": 9}, "width"),
        ({"rule": RoutingRule("tanh", 2, True)}, "scoring"),
        ({"rule": RoutingRule("softmax", 2, True, 3, 1)}, "groups"),
        (
            {"rule": RoutingRule("softmax", 2, True, correction_bias=torch.zeros(7))},
            "correction_bias",
        ),
        ({"table": TABLE._replace(packed=TABLE.packed[:, :-16])}, "table.packed"),
        ({"table": TABLE._replace(packed=TABLE.packed.int())}, "table.packed"),
        ({"table": TABLE._replace(packed=UNALIGNED)}, "16 bytes"),
    ],
)
def test_wrong_arguments_are_refused(changed, message):
    if DEVICE != "cpu":
        pytest.skip("the checks are the host's")
    with pytest.raises(ValueError, match=message):
        call(**changed)
