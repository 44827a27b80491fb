# SPDX-License-Identifier: Apache-2.0
"""Short ways to make shapes, plans and routed rows."""

import math

import numpy as np
import torch

from moe_tta.kernels.reference import RoutingRule, route
from moe_tta.kernels.table import Features, PlanTable
from moe_tta.plan import FIELDS, RoutingPlan
from moe_tta.shape import RouterShape

U = 2.0**-24  # unit roundoff of float32
RTOL = 32 * U  # a softmax over 4 experts, a sum and a division
# p = 0.4, 0.3, 0.2, 0.1 for experts 0..3
LOGITS = [math.log(0.4), math.log(0.3), math.log(0.2), math.log(0.1)]

# unbiased scores 0.5, 0.75, 0.25, 0.2 and 1, 2, 0.5, 0.25
SIGMOID = [0.0, math.log(3), -math.log(3), -math.log(4)]
SQRTSOFTPLUS = [math.log(math.exp(w * w) - 1) for w in (1, 2, 0.5, 0.25)]


def make_shape(num_experts=4, top_k=2, k_max=4, layers=(0,), **fields):
    return RouterShape(
        layers=layers,
        num_hidden_layers=max(layers) + 1,
        num_experts=num_experts,
        top_k=top_k,
        k_max=k_max,
        **fields,
    )


def make_plan(num_layers=1, **fields):
    """Give every layer the same row (or number); dtypes are the plan's."""
    arrays = {
        name: np.stack([np.asarray(value, FIELDS[name][0])] * num_layers)
        for name, value in fields.items()
    }
    return RoutingPlan(**arrays)


def experts(num_experts, *chosen):
    """Return a bool row with the chosen experts set."""
    row = np.zeros(num_experts, bool)
    row[list(chosen)] = True
    return row


def routed(logits, shape, plan, correction_bias=None, positions=None, layer=0):
    """Route rows that all obey the plan; return [(ids in use, weights)] and check it.

    Unused columns must hold the row's first id and weight 0. A used column may have
    weight 0 as well, so those count as used as far as their ids are new.
    """
    plan.validate(shape)
    table = PlanTable(shape, 1, "cpu")
    table.write({1: plan})
    logits = torch.as_tensor(logits, dtype=torch.float32)
    logits = logits.reshape(-1, logits.shape[-1])
    if positions is None:
        positions = torch.arange(len(logits))
    bias = None if correction_bias is None else torch.tensor(correction_bias)
    result = route(
        logits,
        torch.ones(len(logits), dtype=torch.int32),
        positions,
        table.layer(0),
        RoutingRule.from_shape(shape, bias),
        shape.k_max,
        layer,
        table.features(1),
    )
    return [used(*row) for row in zip(*result, strict=True)]


def one(logits, shape, plan, **more):
    """Route one row."""
    return routed(logits, shape, plan, **more)[0]


def check(result, ids, weights):
    assert result[0] == ids
    np.testing.assert_allclose(result[1], weights, rtol=RTOL)


def used(weights, ids):
    """Split one row's used columns from the aliased tail."""
    ids, weights = ids.tolist(), weights.tolist()
    count = 1
    while count < len(ids) and ids[count] != ids[0]:
        count += 1
    assert ids[count:] == [ids[0]] * (len(ids) - count)
    assert weights[count:] == [0.0] * (len(ids) - count)
    return ids[:count], weights[:count]


def make_table(shape, *plans):
    """Return a table whose slots 1.. hold the plans."""
    table = PlanTable(shape, max(len(plans), 1), "cpu")
    table.write(dict(enumerate(plans, start=1)))
    return table


def features_of(table, slots):
    """Return what the slots in use need."""
    needed = Features.NONE
    for slot in set(slots.tolist()):
        needed |= table.features(slot)
    return needed
