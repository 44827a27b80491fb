# SPDX-License-Identifier: Apache-2.0
"""Slot 0 against vLLM's own CPU routers."""

import pytest
import torch
from vllm.model_executor.layers.fused_moe.router import grouped_topk_router
from vllm.model_executor.layers.fused_moe.router.cpu_router import (
    CPURouter,
    _grouped_topk,
    _softmax_topk,
    _sqrtsoftplus_bias_topk,
)

from moe_tta.kernels.reference import RoutingRule, model_routing, route
from moe_tta.plan import RoutingPlan
from tests.kernels.cases import U, make_plan, make_shape, make_table
from tests.kernels.rounded_groups import U_BFLOAT16, check_rounded

EXPERTS = (8, 60, 64, 128, 160, 256)
TOP_KS = (1, 2, 6, 8)
TOKENS = (0, 1, 7, 63, 257)
# logits lie within 6, so z - logZ is within 16 and rounds by 2^-21 = 8 U, exp turns
# that into 8 U of the weight; sums of k <= 8 and of E terms in vector lanes, two
# divisions, exp and the scaling factor add at most 24 U more
RTOL = 32 * U
GROUPS = {8: (4, 2), 60: (6, 3), 64: (8, 4), 128: (8, 2), 160: (8, 3), 256: (8, 4)}


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill whatever torch does not initialise with NaN (integers: the largest)."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(64).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def draw_logits(num_tokens, num_experts):
    rng = torch.Generator().manual_seed(num_tokens * 1000 + num_experts)
    return torch.randn(num_tokens, num_experts, generator=rng).clamp(-6, 6)


def draw_bias(num_experts):
    return torch.randn(num_experts, generator=torch.Generator().manual_seed(1)) / 4


def by_expert(weights, ids):
    """Sort columns by expert, for vLLM leaves their order open."""
    ids, order = ids.long().sort(dim=1)
    return weights.gather(1, order), ids


def check(ours, stock, top_k):
    weights, ids = by_expert(ours.topk_weights[:, :top_k], ours.topk_ids[:, :top_k])
    stock_weights, stock_ids = by_expert(*stock)
    assert torch.equal(ids, stock_ids)
    torch.testing.assert_close(weights, stock_weights, rtol=RTOL, atol=0)
    assert (ours.topk_weights[:, top_k:] == 0).all()


def ours(logits, rule, width):
    """Slot 0's routing, of the whole law and of `model_routing` alike."""
    num_tokens, num_experts = logits.shape
    shape = make_shape(num_experts, rule.top_k, width)
    table = make_table(shape, make_plan(allow=torch.arange(num_experts) > 3))
    slots, positions = torch.zeros(2, num_tokens, dtype=torch.int64)
    whole = route(logits, slots, positions, table.layer(0), rule, width, 0)
    short = model_routing(logits, rule, width)
    assert torch.equal(whole.topk_ids, short.topk_ids)
    assert torch.equal(whole.topk_weights, short.topk_weights)
    return whole


sizes = pytest.mark.parametrize("num_tokens", TOKENS)
widths = pytest.mark.parametrize(
    ("num_experts", "top_k"), [(e, k) for e in EXPERTS for k in TOP_KS]
)


@sizes
@widths
@pytest.mark.parametrize("renormalize", [True, False])
def test_softmax(num_tokens, num_experts, top_k, renormalize):
    logits = draw_logits(num_tokens, num_experts)
    stock = _softmax_topk(logits, top_k, renormalize)
    rule = RoutingRule("softmax", top_k, renormalize)
    check(ours(logits, rule, min(top_k + 2, num_experts)), stock, top_k)


@sizes
@widths
@pytest.mark.parametrize(
    ("scoring", "biased"), [("softmax", False), ("sigmoid", False), ("sigmoid", True)]
)
def test_grouped(num_tokens, num_experts, top_k, scoring, biased):
    groups, topk_group = GROUPS[num_experts]
    topk_group = max(topk_group, -(-top_k * groups // num_experts))
    logits = draw_logits(num_tokens, num_experts)
    bias = draw_bias(num_experts) if biased else None
    rule = RoutingRule(scoring, top_k, True, groups, topk_group, 2.5, bias)
    got = ours(logits, rule, top_k)
    if num_tokens == 0:  # vLLM's own cannot reshape an empty batch
        assert got.topk_ids.shape == (0, top_k)
        return
    stock = _grouped_topk(logits, top_k, True, groups, topk_group, scoring, 2.5, bias)
    check(got, stock, top_k)


@pytest.mark.parametrize("biased", [False, True])
def test_grouped_topk_of_accelerators(biased):
    logits, bias = draw_logits(63, 160), draw_bias(160) if biased else None
    with torch.compiler.set_stance("force_eager"):
        stock = grouped_topk_router.grouped_topk(
            logits, logits, 6, False, 8, 3, "softmax", 16.0, bias
        )
    rule = RoutingRule("softmax", 6, False, 8, 3, 16.0, bias)
    check(ours(logits, rule, 6), stock, 6)


def test_grouped_topk_of_accelerators_in_bfloat16():
    logits = draw_logits(4096, 160).bfloat16()
    with torch.compiler.set_stance("force_eager"):
        weights, ids = grouped_topk_router.grouped_topk(
            logits, logits, 6, False, 8, 3, "softmax"
        )
    got = torch.zeros(logits.shape).scatter_(1, ids.long(), weights)
    rule = RoutingRule("softmax", 6, False, 8, 3)
    assert check_rounded(got, logits, rule, RTOL) > 0.9
    scores = logits.float().softmax(dim=1)
    assert ((got / scores - 1).abs() * (got > 0)).max() > 2**-9  # more than half of it
    for wrong in (
        got * (1 + 2.5 * U_BFLOAT16),
        got.roll(1, dims=0),
        got.where(got < got.amax(dim=1, keepdim=True), 0),
    ):
        with pytest.raises(AssertionError):
            check_rounded(wrong, logits, rule, RTOL)


# the sizes that vLLM's CPU kernel was built for
@sizes
@pytest.mark.parametrize("num_experts", [64, 128, 256])
@pytest.mark.parametrize("top_k", [6, 8])
def test_sqrtsoftplus(num_tokens, num_experts, top_k):
    logits, bias = draw_logits(num_tokens, num_experts), draw_bias(num_experts)
    stock = _sqrtsoftplus_bias_topk(logits, top_k, True, bias, 1.5, None, None)
    rule = RoutingRule(
        "sqrtsoftplus", top_k, True, routed_scaling_factor=1.5, correction_bias=bias
    )
    check(ours(logits, rule, top_k), stock, top_k)


@pytest.mark.parametrize("grouped", [False, True])
def test_router_object(grouped):
    logits = draw_logits(63, 64)
    fields = {"num_expert_group": 8, "topk_group": 4} if grouped else {}
    router = CPURouter(6, 64, use_grouped_topk=grouped, renormalize=False, **fields)
    stock = router._compute_routing(logits, logits, torch.int32)
    check(ours(logits, RoutingRule("softmax", 6, False, **fields), 6), stock, 6)


@pytest.mark.parametrize("num_experts", EXPERTS)
def test_neutral_slot_equals_slot_0(num_experts):
    logits = draw_logits(63, num_experts)
    table = make_table(make_shape(num_experts, 2, 4), RoutingPlan())
    rule = RoutingRule("softmax", 2, True)
    slots = torch.arange(63) % 2
    mixed = route(logits, slots, slots, table.layer(0), rule, 4, 0)
    assert torch.equal(mixed.topk_weights, ours(logits, rule, 4).topk_weights)
