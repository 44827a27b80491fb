# SPDX-License-Identifier: Apache-2.0
"""What `biased_topk` must equal, at any size: the law of routing and autograd."""

import torch

from moe_tta.kernels.biased_topk import biased_topk
from moe_tta.kernels.reference import RoutingRule, route
from moe_tta.kernels.table import Features, PlanTable
from tests.kernels.cases import U, make_shape
from tests.kernels.expert_checks import assert_within, draw


def make_rule(num_experts, top_k, renormalize, scoring="softmax"):
    fields = {"renormalize": renormalize, "scoring": scoring}
    shape = make_shape(num_experts, top_k, top_k, **fields)
    return shape, RoutingRule.from_shape(shape)


def by_law(shape, rule, logits, slots, bias):
    """Return the law's routing of plans with these vectors [S, E]."""
    table = PlanTable(shape, len(bias), "cpu").layer(0)
    table = table._replace(bias=torch.cat([torch.zeros_like(bias[:1]), bias]))
    return route(logits, slots, slots, table, rule, rule.top_k, 0, Features.BIAS)


def check(shape, rule, logits, slots, bias, device):
    """Ids equal the law's; weights and gradients as far as both may round.

    Each side takes 2 E terms and fewer than 64 roundings besides for a weight. A
    gradient is share_j (g_j - sum w g), in autograd by way of two such sums, whose
    terms have the same bound; a slot's is summed over its rows.
    """
    slope = draw(len(logits), rule.top_k, seed=4)
    logits, bias = logits.detach().requires_grad_(), bias.detach().requires_grad_()
    law = by_law(shape, rule, logits, slots, bias)
    wanted = torch.autograd.grad((law.topk_weights * slope).sum(), (logits, bias))

    ours = [part.detach().to(device).requires_grad_() for part in (logits, bias)]
    weights, ids = biased_topk(ours[0], rule, slots.to(device), ours[1])
    loss = (weights * slope.to(device)).sum()
    found = torch.autograd.grad(loss, ours, retain_graph=True)
    assert ids.dtype == torch.int64
    assert torch.equal(ids.cpu().int(), law.topk_ids)
    rounding = 2 * (2 * shape.num_experts + 64) * U
    torch.testing.assert_close(
        weights.detach().cpu(), law.topk_weights.detach(), rtol=rounding, atol=0
    )

    size = _sizes(logits, slots, bias, law, slope) * rounding
    u = torch.finfo(logits.dtype).eps / 2
    assert found[0].dtype == logits.dtype
    bound = size + 2 * u * wanted[0].abs()
    assert_within(found[0].cpu(), wanted[0], bound)
    every = torch.zeros(len(bias) + 1, shape.num_experts, dtype=torch.float64)
    adding = 2 * len(logits) * U * wanted[0].double().abs() * (1 + u)
    bound = every.index_add(0, slots.long(), size + adding)[1:]
    assert_within(found[1].cpu(), wanted[1], bound)
    again = torch.autograd.grad(loss, ours)
    assert all(map(torch.equal, found, again))


def _sizes(logits, slots, bias, law, slope):
    """Return share_j (|g_j| + 4 sum |w g|) [T, E], the larger of both shares."""
    with torch.no_grad():
        shifts = torch.cat([torch.zeros_like(bias[:1]), bias]).double()
        shares = torch.softmax(logits.double() + shifts[slots.long()], dim=1)
        ids, weights = law.topk_ids.long(), law.topk_weights.double()
        chosen = torch.zeros_like(shares).scatter_(1, ids, weights)
        slopes = torch.zeros_like(shares).scatter_(1, ids, slope.double().abs())
        mean = (weights * slope.double().abs()).sum(dim=1, keepdim=True)
        return torch.maximum(shares, chosen) * (slopes + 4 * mean)
