# SPDX-License-Identifier: Apache-2.0
"""The adapter's routers choose and weigh as the law does, bit for bit."""

import pytest
import torch

from moe_tta.adapter.routing import AdaptedRouter, EditTables, LayerEdit
from moe_tta.kernels.reference import RoutingRule, model_routing, route
from moe_tta.kernels.table import PlanTable
from moe_tta.plan import RoutingPlan
from moe_tta.shape import RouterShape

CPU = torch.device("cpu")


def shape(renormalize):
    return RouterShape(
        layers=(0,),
        num_hidden_layers=1,
        num_experts=12,
        top_k=3,
        k_max=3,
        renormalize=renormalize,
    )


@pytest.fixture(params=[True, False], ids=["renormalised", "as they are"])
def router(request, draw):
    model = shape(request.param)
    weight = torch.nn.Parameter(draw.normal(12, 8), requires_grad=False)
    return AdaptedRouter(weight, model, EditTables(model, CPU)), model


def by_plans(plans, model, logits, slots):
    table = PlanTable(model, len(plans), CPU)
    for plan in plans:
        plan.validate(model)
    table.write(dict(enumerate(plans, start=1)))
    rule = RoutingRule.from_shape(model)
    return route(logits, slots, slots, table.layer(0), rule, 3, 0)


def test_without_an_edit_it_is_the_models_rule(router, draw):
    module, model = router
    logits, weights, ids = module(draw.normal(50, 8))
    wanted = model_routing(logits, RoutingRule.from_shape(model), 3)
    assert torch.equal(weights, wanted.topk_weights)
    assert torch.equal(ids.int(), wanted.topk_ids)


def test_vectors_are_plans_with_a_bias(router, draw):
    module, model = router
    bias, slots = draw.normal(2, 12), torch.arange(60) % 3
    module.edit = LayerEdit(slots, bias=bias)
    logits, weights, ids = module(draw.normal(60, 8))
    plans = [RoutingPlan(bias=row[None].numpy()) for row in bias]
    wanted = by_plans(plans, model, logits, slots)
    assert torch.equal(weights, wanted.topk_weights)
    assert torch.equal(ids.int(), wanted.topk_ids)


def test_distributions_are_plans_with_a_target(router, draw):
    module, model = router
    target = torch.softmax(draw.normal(2, 12), dim=1)
    slots = torch.arange(60) % 3
    module.edit = LayerEdit(slots, target=target)
    logits, weights, ids = module(draw.normal(60, 8))
    one = torch.ones(1).numpy()
    plans = [RoutingPlan(target=row[None].numpy(), mix=one) for row in target]
    wanted = by_plans(plans, model, logits, slots)
    assert torch.equal(weights, wanted.topk_weights)
    assert torch.equal(ids.int(), wanted.topk_ids)


def test_gradient_by_hand():
    """Weights that are not renormalised: dp_i/dd_j = p_i (1[i = j] - p_j)."""
    model = RouterShape((0,), 1, 3, 2, 2, renormalize=False)
    weight = torch.nn.Parameter(torch.eye(3), requires_grad=False)
    module = AdaptedRouter(weight, model, EditTables(model, CPU))
    delta = torch.zeros(1, 3, requires_grad=True)
    module.edit = LayerEdit(torch.tensor([1]), bias=delta)
    _, weights, ids = module(torch.tensor([[2.0, 1.0, 0.0]]))
    assert ids.tolist() == [[0, 1]]
    weights[0, 0].backward()
    p = torch.softmax(torch.tensor([2.0, 1.0, 0.0]), dim=0)
    wanted = torch.stack([p[0] * (1 - p[0]), -p[0] * p[1], -p[0] * p[2]])
    torch.testing.assert_close(delta.grad[0], wanted)
