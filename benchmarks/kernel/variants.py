# SPDX-License-Identifier: Apache-2.0
"""What the benchmark launches: the routing kernel under three loads, and stock."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.kernel.grid import Case, must_read
from benchmarks.kernel.stock import Stock
from moe_tta.kernels.route import route_triton
from moe_tta.kernels.scores import RoutingRule
from moe_tta.kernels.table import LayerTable, PlanTable
from moe_tta.plan import RoutingPlan, Select
from moe_tta.shape import RouterShape

NUM_PLANS = 65536  # slots of the table of distinct plans
_DRAWN = 64  # plans that differ in content; the others repeat them elsewhere


class Variant(NamedTuple):
    """One launch per logits buffer, and the bytes that each must read."""

    read_bytes: int
    launches: list[Callable[[], object]]


class Model:
    """Routers of one size with their tables: one biased plan, and many full plans."""

    def __init__(self, experts: int, top_k: int):
        shape = RouterShape((0,), 1, experts, top_k, top_k)
        rng = np.random.default_rng(experts)
        self.rule = RoutingRule.from_shape(shape)
        self.biased = RoutingPlan(bias=_normal(rng, experts))
        self.one = _table(shape, [self.biased], 1)
        full = [full_plan(rng, shape) for _ in range(_DRAWN)]
        self.full = full[0]
        self.many = _table(shape, full, NUM_PLANS)

    def variants(
        self, case: Case, logits: list[torch.Tensor], stock: Stock | None
    ) -> dict[str, Variant]:
        """Return the variants of a case by name; `logits` are its buffers."""
        rows = torch.arange(case.tokens, dtype=torch.int32, device="cuda")
        none, positions = torch.zeros_like(rows), rows.long()
        # launches of a graph walk through the table, as they do through the logits
        walk = [
            (rows + index * case.tokens) % NUM_PLANS + 1 for index in range(len(logits))
        ]

        def ours(
            table: LayerTable, slots: list[torch.Tensor], num_planned: int
        ) -> list[Callable]:
            rest = positions, table, self.rule, case.top_k, 0
            return [
                partial(route_triton, x, s, *rest, num_planned=num_planned)
                for x, s in zip(logits, slots, strict=True)
            ]

        count, read = len(logits), partial(must_read, case)
        found = {
            "slot 0": Variant(read(), ours(self.one, [none] * count, 0)),
            "one bias": Variant(
                read(self.biased, 1), ours(self.one, [none + 1] * count, case.tokens)
            ),
            "all differ": Variant(
                read(self.full, min(case.tokens, NUM_PLANS)),
                ours(self.many, walk, case.tokens),
            ),
        }
        if stock is not None:
            calls = [
                partial(stock, x, case.top_k, self.rule.renormalize) for x in logits
            ]
            found["stock"] = Variant(read(), calls)
        return found


def full_plan(rng: np.random.Generator, shape: RouterShape) -> RoutingPlan:
    """Return a plan with a bias, a promoted and a demoted expert, and top-p."""
    steered = rng.permutation(shape.num_experts)
    every = np.arange(shape.num_experts)[None]
    return RoutingPlan(
        bias=_normal(rng, shape.num_experts),
        promote=every == steered[0],
        demote=every == steered[1],
        select=np.array([Select.TOP_P], np.int32),
        k_min=np.array([1], np.int32),
        k_max=np.array([shape.top_k], np.int32),
        select_args=np.array([[0.8, 0, 0]], np.float32),
    )


def _normal(rng: np.random.Generator, experts: int) -> np.ndarray:
    return rng.normal(0, 1, (1, experts)).astype(np.float32)


def _table(shape: RouterShape, plans: list[RoutingPlan], num_slots: int) -> LayerTable:
    table = PlanTable(shape, num_slots, "cuda")
    for plan in plans:
        plan.validate(shape)
    table.write(dict(enumerate(plans, start=1)))
    layer = table.layer(0)
    repeated = torch.arange(num_slots, device="cuda") % len(plans) + 1
    for field in layer:
        field[1:] = field[repeated]
    return layer
