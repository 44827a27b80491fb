# SPDX-License-Identifier: Apache-2.0
"""Softmax routing with gradients; `test_triton.py` runs this in a process."""

import math

import numpy as np
import pytest
import torch

from moe_tta.kernels.biased_topk import biased_topk, is_plain_softmax
from moe_tta.kernels.reference import model_routing
from tests.kernels import topk_checks as checks
from tests.kernels.cases import make_shape
from tests.kernels.drawing import grid
from tests.kernels.expert_checks import draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
RENORMALIZES = pytest.mark.parametrize(
    "renormalize", [True, False], ids=["renormalised", "as they are"]
)


@pytest.fixture(autouse=True)
def poison():
    """Make fresh outputs NaN and the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def vectors(count, num_experts):
    """Return [S, E] as the adapter has them: every third row of a tensor."""
    return draw(count, 3, num_experts, seed=2)[:, 1]


@RENORMALIZES
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "num_experts", "top_k"),
    [(1, 4, 1), (1, 8, 8), (7, 12, 3), (33, 60, 4), (21, 64, 8), (9, 128, 8)],
)
def test_equals_the_law(num_rows, num_experts, top_k, dtype, renormalize):
    shape, rule = checks.make_rule(num_experts, top_k, renormalize)
    logits = (3 * draw(num_rows, num_experts)).to(dtype)
    slots = torch.arange(num_rows) * 7 % 4
    checks.check(shape, rule, logits, slots, vectors(3, num_experts), DEVICE)


@RENORMALIZES
def test_ties_go_to_the_lowest_id(renormalize):
    shape, rule = checks.make_rule(16, 5, renormalize)
    rng = np.random.default_rng(0)
    logits = torch.from_numpy(np.round(grid(rng, (40, 16), 2)))
    logits[::3] = -0.0
    bias = torch.from_numpy(np.round(grid(rng, (2, 16), 1)))
    slots = torch.from_numpy(rng.integers(0, 3, 40))
    checks.check(shape, rule, logits, slots, bias, DEVICE)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_runs_of_requests_with_padding(dtype):
    """As `PackedTexts.slots` has them; the third request has no row of its own."""
    shape, rule = checks.make_rule(8, 2, False)
    slots = torch.tensor([0] * 5 + [1] * 40 + [0] * 3 + [2] * 44 + [0] * 4).to(dtype)
    checks.check(shape, rule, draw(96, 8), slots, vectors(3, 8), DEVICE)


def test_vectors_may_lie_across():
    shape, rule = checks.make_rule(8, 2, False)
    slots = torch.arange(9) % 4
    checks.check(shape, rule, draw(9, 8), slots, draw(8, 3, seed=2).T, DEVICE)


def test_more_rows_than_are_looked_at_together():
    shape, rule = checks.make_rule(4, 2, True)
    slots = torch.zeros(1060, dtype=torch.int64)
    slots[990:1040] = 1
    slots[1050:] = 2
    checks.check(shape, rule, draw(1060, 4), slots, vectors(2, 4), DEVICE)


def test_a_slot_without_rows_has_no_gradient():
    _, rule = checks.make_rule(8, 2, False)
    bias = vectors(2, 8).to(DEVICE).requires_grad_()
    slots = torch.tensor([0, 2], device=DEVICE)
    weights, _ = biased_topk(draw(2, 8).to(DEVICE), rule, slots, bias)
    (grad,) = torch.autograd.grad(weights[:, 0].sum(), bias)
    assert not grad[0].any()
    assert grad[1].any()


def test_gradient_by_hand():
    """dp_i / dz_j = p_i (1[i = j] - p_j), of the better of p = 0.4, 0.3, 0.2, 0.1."""
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1])
    logits = shares.log()[None].to(DEVICE).requires_grad_()
    for renormalize, wanted in (
        (False, [0.24, -0.12, -0.08, -0.04]),
        # w = 4/7 and 3/7
        (True, [12 / 49, -12 / 49, 0.0, 0.0]),
    ):
        _, rule = checks.make_rule(4, 2, renormalize)
        weights, ids = biased_topk(logits, rule)
        assert ids.tolist() == [[0, 1]]
        (grad,) = torch.autograd.grad(weights[0, 0], logits)
        torch.testing.assert_close(grad.cpu(), torch.tensor([wanted]))


@RENORMALIZES
@pytest.mark.parametrize("scoring", ["softmax", "topk_softmax"])
def test_without_vectors_it_is_the_models_rule(renormalize, scoring):
    _, rule = checks.make_rule(12, 3, renormalize, scoring)
    logits = draw(30, 12)
    weights, ids = biased_topk(logits.to(DEVICE), rule)
    law = model_routing(logits, rule, 3)
    assert torch.equal(ids.cpu().int(), law.topk_ids)
    bound = 2 * (2 * 12 + 64) * checks.U
    torch.testing.assert_close(weights.cpu(), law.topk_weights, rtol=bound, atol=0)


def test_rows_that_are_no_numbers_get_ids_in_range():
    _, rule = checks.make_rule(8, 3, True)
    logits = draw(6, 8)
    clean = biased_topk(logits.to(DEVICE), rule)
    logits[0, 2], logits[1], logits[2] = math.nan, math.nan, -math.inf
    logits[3, 5] = math.inf
    weights, ids = biased_topk(logits.to(DEVICE), rule)
    assert ((ids >= 0) & (ids < 8)).all()
    assert all(len(set(row)) == 3 for row in ids.tolist())
    assert torch.equal(ids[4:], clean[1][4:])
    assert torch.equal(weights[4:], clean[0][4:])


def test_rules_that_it_knows():
    fields = {"num_experts": 8, "top_k": 2, "k_max": 2}
    for other, known in (
        ({}, True),
        ({"scoring": "topk_softmax"}, True),
        ({"scoring": "sigmoid"}, False),
        ({"num_expert_group": 2, "topk_group": 1}, False),
        ({"routed_scaling_factor": 2.0}, False),
    ):
        rule = checks.RoutingRule.from_shape(make_shape(**fields, **other))
        assert is_plain_softmax(rule) == known
