# SPDX-License-Identifier: Apache-2.0
"""Checks of a routing plan against a model's routers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_tta.plan import (
    FIELDS,
    MAX_RECALLED,
    NUM_SELECT_ARGS,
    PlanError,
    Renorm,
    Select,
)

if TYPE_CHECKING:
    from moe_tta.plan import RoutingPlan
    from moe_tta.shape import RouterShape

CODES = {"select": frozenset(Select), "renorm": frozenset(Renorm)}


def check_plan(plan: RoutingPlan, shape: RouterShape) -> None:
    """Raise `PlanError` where the plan does not fit the model."""
    _check_arrays(plan, shape)
    _check_selection(plan, shape)
    _check_masks(plan, shape)
    _check_target(plan, shape)
    _check_memory(plan, shape)


def _check_arrays(plan: RoutingPlan, shape: RouterShape) -> None:
    num_layers, num_experts = len(shape.layers), shape.num_experts
    for name, value in plan.arrays().items():
        dtype, per_expert, _ = FIELDS[name]
        want = (num_layers, num_experts) if per_expert else (num_layers,)
        if name == "select_args":
            want = (num_layers, NUM_SELECT_ARGS)
        if value.shape != want:
            raise PlanError(f"{name} has shape {value.shape}, expected {want}")
        if value.dtype != dtype:
            raise PlanError(f"{name} is {value.dtype}, expected {np.dtype(dtype)}")
        if value.dtype == np.float32 and not np.isfinite(value).all():
            raise PlanError(f"{name} holds values that are not finite")
    for name, codes in CODES.items():
        value = getattr(plan, name)
        if value is not None and not codes.issuperset(value.tolist()):
            raise PlanError(f"{name} holds a code that is none of {sorted(codes)}")


def _check_masks(plan: RoutingPlan, shape: RouterShape) -> None:
    if plan.promote is not None:
        if plan.demote is not None and (plan.promote & plan.demote).any():
            raise PlanError("an expert is both promoted and demoted")
        if plan.allow is not None and (plan.promote & ~plan.allow).any():
            raise PlanError("an expert is promoted but not allowed")
        _check_promoted_groups(plan.promote, shape)
    if plan.scale is not None and (plan.scale < 0).any():
        raise PlanError("scale holds a negative factor, expected >= 0")
    _check_enough_allowed(plan, shape)


def _check_promoted_groups(promote: np.ndarray, shape: RouterShape) -> None:
    if not shape.grouped:
        return
    groups = promote.reshape(len(promote), shape.num_expert_group, -1).any(axis=2)
    for layer, count in zip(shape.layers, groups.sum(axis=1), strict=True):
        if count > shape.topk_group:
            raise PlanError(
                f"layer {layer}: promoted experts lie in {count} groups, but a token "
                f"uses {shape.topk_group} of {shape.num_expert_group}"
            )


def _check_enough_allowed(plan: RoutingPlan, shape: RouterShape) -> None:
    """Every row must find as many allowed experts as it will use."""
    needed = _needed_experts(plan, shape)
    reachable = _reachable_experts(plan.allow, shape)
    short = reachable < needed
    if not short.any():
        return
    index = short.argmax()
    where = (
        f" in the {shape.topk_group} groups a token may be given"
        if shape.grouped
        else ""
    )
    raise PlanError(
        f"layer {shape.layers[index]}: {reachable[index]} experts stay "
        f"allowed{where}, expected at least {needed[index]}"
    )


def _reachable_experts(allow: np.ndarray | None, shape: RouterShape) -> np.ndarray:
    """Return int [L]: the fewest allowed experts a token's groups can hold."""
    num_layers, groups = len(shape.layers), shape.num_expert_group
    if allow is None:
        return np.full(num_layers, shape.num_experts // groups * shape.topk_group)
    counts = np.sort(allow.reshape(num_layers, groups, -1).sum(axis=2), axis=1)
    # the worst choice of groups a token can make: the smallest non-empty ones
    filled = counts > 0
    chosen = filled & (filled.cumsum(axis=1) <= shape.topk_group)
    return (counts * chosen).sum(axis=1)


def _needed_experts(plan: RoutingPlan, shape: RouterShape) -> np.ndarray:
    """Return int [L]: the most experts a row may use in each layer."""
    needed = np.full(len(shape.layers), shape.top_k)
    if plan.select is None:
        return needed
    chosen = np.where(plan.select == int(Select.MODEL), shape.top_k, plan.k_max)
    ranks = plan.select == int(Select.RANKS)
    if ranks.any():
        chosen[ranks] += plan.select_args[ranks, 0].astype(chosen.dtype)
    return chosen


def _check_target(plan: RoutingPlan, shape: RouterShape) -> None:
    if plan.mix is None:
        if plan.target is not None:
            raise PlanError("target needs mix")
        return
    if not shape.is_distribution:
        raise PlanError(
            "target and mix need a softmax router without correction bias; this model "
            f"scores with {shape.scoring}"
            + (" and a correction bias" if shape.has_correction_bias else "")
        )
    if ((plan.mix < 0) | (plan.mix > 1)).any():
        raise PlanError("mix must lie in [0, 1]")
    used = plan.mix > 0
    if plan.target is None or (plan.target[used] < 0).any():
        raise PlanError("target must hold probabilities >= 0 where mix > 0")
    totals = plan.target[used].sum(axis=1)
    if not np.allclose(totals, 1.0, atol=1e-3):
        raise PlanError("target must sum to 1 over experts where mix > 0")


def _check_memory(plan: RoutingPlan, shape: RouterShape) -> None:
    if plan.memory is None:
        if plan.neighbours is not None:
            raise PlanError("neighbours needs memory")
        return
    if not shape.is_distribution:
        raise PlanError("memory needs a softmax router without correction bias")
    used = plan.memory > 0
    if (plan.memory < 0).any():
        raise PlanError("memory must be a place from 1, or 0 for none")
    if (
        plan.neighbours is None
        or not (
            (plan.neighbours[used] >= 1) & (plan.neighbours[used] <= MAX_RECALLED)
        ).all()
    ):
        raise PlanError(
            f"neighbours must lie in 1..{MAX_RECALLED} where memory is used"
        )
    if plan.mix is not None and (used & (plan.mix > 0)).any():
        raise PlanError("a layer has both a target and a memory to look one up in")


def _check_selection(plan: RoutingPlan, shape: RouterShape) -> None:
    if plan.select is None:
        if plan.k_min is not None or plan.k_max is not None:
            raise PlanError("k_min and k_max need select")
        return
    used = plan.select != int(Select.MODEL)
    if plan.k_max is None or plan.select_args is None:
        raise PlanError("select needs k_max and select_args")
    k_min = np.ones_like(plan.k_max) if plan.k_min is None else plan.k_min
    low, high = k_min[used], plan.k_max[used]
    if (low < 1).any() or (low > high).any() or (high > shape.k_max).any():
        raise PlanError(
            f"selected counts must satisfy 1 <= k_min <= k_max <= {shape.k_max} "
            "(the engine's k_max)"
        )
    _check_select_args(plan.select, plan.select_args, plan.k_max, shape)


def _check_select_args(
    select: np.ndarray, args: np.ndarray, k_max: np.ndarray, shape: RouterShape
) -> None:
    rules = set(select.tolist())
    if Select.RANKS in rules:
        ranks = select == Select.RANKS
        first, last = args[ranks, 0], args[ranks, 0] + k_max[ranks]
        if (first < 0).any() or (last > shape.num_experts).any():
            raise PlanError(f"ranks must lie in 0..{shape.num_experts - 1}")
        if (first % 1 != 0).any():
            raise PlanError("the first rank must be a whole number")
    if Select.ENTROPY in rules:
        low, high, _ = args[select == Select.ENTROPY].T
        if (low > high).any():
            raise PlanError("entropy bounds must satisfy low <= high")
    if Select.SAMPLE in rules:
        sample = select == Select.SAMPLE
        _check_sampling(*args[sample].T, k_max[sample])


def _check_sampling(
    keep: np.ndarray, pool: np.ndarray, tau: np.ndarray, k_max: np.ndarray
) -> None:
    if (keep < 0).any() or (keep > k_max).any() or (k_max > pool).any():
        raise PlanError("sampling must satisfy 0 <= keep <= k_max <= pool")
    if (tau <= 0).any():
        raise PlanError("sampling temperature tau must be > 0")
