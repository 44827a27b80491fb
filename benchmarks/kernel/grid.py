# SPDX-License-Identifier: Apache-2.0
"""Shapes of the kernel benchmark, and the bytes that each must move."""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

from moe_tta.plan import FIELDS, NUM_SELECT_ARGS, RoutingPlan

MODELS = ((8, 2), (64, 8), (128, 8), (256, 8), (512, 10))  # (experts, top_k)
TOKENS = {
    "small": (1, 64, 1024, 16384),
    "full": (1, 8, 64, 256, 1024, 4096, 16384, 65536),
}
LOGIT_BYTES = 2  # bfloat16
CHOICE_BYTES = 8  # one float32 weight and one int32 id
_FLAGS = ("allow", "promote", "demote", "drop")  # share one byte per expert


class Case(NamedTuple):
    """One launch: T tokens, E experts, k experts per token."""

    tokens: int
    experts: int
    top_k: int


def cases(grid: str) -> list[Case]:
    """Return the cases of a grid in `TOKENS`, one model after the other."""
    return [Case(t, *model) for model, t in product(MODELS, TOKENS[grid])]


def plan_bytes(plan: RoutingPlan, num_experts: int) -> int:
    """Return the bytes of one layer's table that hold what the plan sets.

    Neutral fields count nothing, `seed` only where it is set: this is what a row
    cannot do without, not what some kernel reads.
    """
    total = 0
    for name, (dtype, per_expert, _) in FIELDS.items():
        if getattr(plan, name) is None or name in _FLAGS:
            continue
        numbers = num_experts if per_expert else 1
        if name == "select_args":
            numbers = NUM_SELECT_ARGS
        total += numbers * dtype().itemsize
    if any(getattr(plan, name) is not None for name in _FLAGS):
        total += num_experts
    return total


def must_read(case: Case, plan: RoutingPlan | None = None, num_plans: int = 0) -> int:
    """Return the bytes a launch must read: logits, and each distinct plan once.

    The 4 bytes of a row's slot are left out: stock reads none.
    """
    plans = 0 if plan is None else num_plans * plan_bytes(plan, case.experts)
    return case.tokens * case.experts * LOGIT_BYTES + plans


def must_write(case: Case) -> int:
    """Return the bytes a launch must write: k weights and ids per token."""
    return case.tokens * case.top_k * CHOICE_BYTES
