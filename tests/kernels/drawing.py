# SPDX-License-Identifier: Apache-2.0
"""A hypothesis strategy: any router; a seed fills its plans and rows."""

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st

from moe_tta.kernels.reference import RoutingRule
from moe_tta.kernels.table import PlanTable
from moe_tta.plan import RoutingPlan, Select
from moe_tta.shape import RouterShape
from tests.kernels.cases import make_table

LAYERS = (3, 7)
NUM_ROWS = 12
# scoring, correction bias, groups, groups a token uses, factor
ROUTERS = [
    ("softmax", False, 1, 1, 1.0),
    ("topk_softmax", False, 1, 1, 1.0),
    ("sigmoid", False, 1, 1, 1.0),
    ("sqrtsoftplus", False, 1, 1, 1.5),
    ("softmax", True, 1, 1, 1.0),
    ("sigmoid", True, 1, 1, 2.5),
    ("sqrtsoftplus", True, 1, 1, 1.5),
    ("softmax", False, 4, 2, 1.0),
    ("softmax", True, 2, 1, 1.0),
    ("sigmoid", True, 4, 3, 2.5),
    ("sigmoid", False, 4, 2, 1.0),
]


@dataclass
class World:
    shape: RouterShape
    rule: RoutingRule
    plans: list[RoutingPlan]
    table: PlanTable
    logits: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor


def grid(rng, size, reach):
    """Return float32 multiples of 1/32 in [-reach, reach]: sums of two are exact."""
    return (rng.integers(-32 * reach, 32 * reach + 1, size) / 32).astype(np.float32)


def make_any_shape(rng, router, num_experts, top_k):
    """Return a shape of one of `ROUTERS`, with a random width and renormalisation."""
    scoring, biased, groups, topk_group, factor = router
    return RouterShape(
        layers=LAYERS,
        num_hidden_layers=8,
        num_experts=num_experts,
        top_k=top_k,
        k_max=int(rng.integers(top_k, min(num_experts, 2 * top_k + 3) + 1)),
        scoring=scoring,
        renormalize=bool(rng.integers(2)),
        num_expert_group=groups,
        topk_group=topk_group,
        has_correction_bias=biased,
        routed_scaling_factor=factor,
    )


def make_any_plan(rng, shape):
    """Fill some fields at random; masks agree with each other."""
    size = (len(shape.layers), shape.num_experts)
    masks = rng.integers(0, 6, size)  # 0 forbidden, 1 promoted, 2 demoted
    masks[:, rng.integers(shape.num_experts)] = 5
    fields = {}
    for name, fill in FILLERS.items():
        if name == "target" and not shape.is_distribution:
            continue
        if rng.random() < 0.3:
            fields.update(fill(rng, size, masks))
    if rng.random() < 0.8:
        fields.update(selection(rng, rng.choice(list(Select), size[0]), shape))
    return RoutingPlan(**fields)


FILLERS = {
    "allow": lambda rng, size, masks: {"allow": masks != 0},
    "bias": lambda rng, size, masks: {"bias": grid(rng, size, 2)},
    "promote": lambda rng, size, masks: {"promote": masks == 1},
    "demote": lambda rng, size, masks: {"demote": masks == 2},
    "target": lambda rng, size, masks: {
        "target": rng.dirichlet(np.ones(size[1]), size[0]).astype(np.float32),
        "mix": rng.choice(np.float32([0, 0.25, 1]), size[0]),
    },
    "scale": lambda rng, size, masks: {
        "scale": rng.choice(np.float32([0, 0.5, 1, 64]), size)
    },
    "drop": lambda rng, size, masks: {"drop": rng.random(size) < 0.3},
    "renorm": lambda rng, size, masks: {
        "renorm": rng.integers(0, 3, size[0]).astype(np.int32)
    },
}


def selection(rng, rules, shape):
    """Return the select fields with numbers that each layer's rule can use."""
    k_max = rng.integers(1, shape.k_max + 1, 2)
    args = np.zeros((2, 3))
    for layer, rule in enumerate(rules):
        if rule in (Select.TOP_P, Select.RELATIVE):
            args[layer, 0] = rng.random()
        elif rule == Select.ABSOLUTE:
            args[layer, 0] = rng.random() * 0.3
        elif rule == Select.ENTROPY:
            args[layer, :2] = np.sort(rng.random(2)) if rng.random() < 0.8 else 0.7
        elif rule == Select.RANKS:
            args[layer, 0] = rng.integers(0, shape.num_experts - k_max[layer] + 1)
        elif rule == Select.SAMPLE:
            keep = rng.integers(0, k_max[layer] + 1)
            pool = rng.integers(k_max[layer], shape.num_experts + 1)
            args[layer] = keep, pool, rng.choice([0.1, 1.0, 3.0])
    return {
        "select": np.array(rules, np.int32),
        "k_min": np.array([rng.integers(1, k + 1) for k in k_max], np.int32),
        "k_max": k_max.astype(np.int32),
        "select_args": args.astype(np.float32),
        "seed": rng.integers(-(2**63), 2**63, 2, dtype=np.int64),
    }


@st.composite
def worlds(draw, routers=tuple(ROUTERS), ties=True):
    """Draw a router, three plans, and rows that obey them or none."""
    scoring, biased, groups, topk_group, factor = draw(st.sampled_from(routers))
    num_experts = draw(st.sampled_from([4, 8, 12]))
    reachable = num_experts // groups * topk_group
    top_k = draw(st.integers(1, min(3, reachable)))
    shape = RouterShape(
        layers=LAYERS,
        num_hidden_layers=8,
        num_experts=num_experts,
        top_k=top_k,
        k_max=draw(st.integers(top_k, min(8, num_experts))),
        scoring=scoring,
        renormalize=draw(st.booleans()),
        num_expert_group=groups,
        topk_group=topk_group,
        has_correction_bias=biased,
        routed_scaling_factor=factor,
    )
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    drawn = [make_any_plan(rng, shape) for _ in range(3)]
    size = (NUM_ROWS, num_experts)
    logits = grid(rng, size, 4)
    if not ties:
        steps = np.argsort(rng.random(size), axis=1)
        logits = (steps - num_experts / 2).astype(np.float32) * np.float32(0.5)
    bias = torch.from_numpy(grid(rng, num_experts, 1)) if biased else None
    return World(
        shape,
        RoutingRule.from_shape(shape, bias),
        [RoutingPlan(), *drawn],
        make_table(shape, *drawn),
        torch.from_numpy(logits),
        torch.from_numpy(rng.integers(0, 4, NUM_ROWS).astype(np.int32)),
        torch.from_numpy(rng.integers(0, 4096, NUM_ROWS)),
    )
