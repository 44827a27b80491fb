# SPDX-License-Identifier: Apache-2.0
"""The plan of steer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moe_tta.artefact import ArtefactError
from moe_tta.errors import RequestError, did_you_mean, show
from moe_tta.plan import FIELDS, RoutingPlan
from moe_tta.strategies.base import PlanContext, as_ranges, layers_in
from moe_tta.strategies.steer.params import INLINE, MAX_BIAS, MAX_SCALE

if TYPE_CHECKING:
    from moe_tta.shape import RouterShape
    from moe_tta.strategies.steer.params import SteerParams

LISTS = tuple(name for name in INLINE if name != "allow")

Fields = dict[str, np.ndarray]  # plan field -> [L, E]


def plan(params: SteerParams, context: PlanContext) -> RoutingPlan:
    """Promote, demote, restrict, bias, scale or drop named experts.

    Source: promote and demote from SteerMoE (arXiv 2509.09660); bias from MASCing
    (arXiv 2604.27818) and Multilingual Routing (arXiv 2510.04694); scale from RICE
    (arXiv 2505.14681); drop from MoTE (arXiv 2502.11096).
    Differs: bias is in absolute logits, not in units of a standard deviation over
    the batch, so that no statistic crosses requests.
    """
    shape = context.shape
    covered = layers_in(shape, params.layers)
    fields = _from_mask(params, context, covered)
    _add_inline(fields, params, shape, covered)
    _check_promoted(fields, params, shape)
    if params.strength is not None:
        _apply_strength(fields, params.strength)
    _check_limits(fields, params)
    if "bias" in fields:
        fields["bias"] = fields["bias"] + np.float32(0)  # one zero, not two
    return RoutingPlan(**fields)


def _from_mask(
    params: SteerParams, context: PlanContext, covered: np.ndarray
) -> Fields:
    if params.mask is None:
        return {}
    if params.mask not in context.artefacts:
        hint = did_you_mean(params.mask, context.artefacts)
        raise RequestError(
            f"unknown mask {show(params.mask)}; {hint}", "mask", params.mask
        )
    artefact = context.artefacts[params.mask]
    try:
        artefact.check(context.shape)
    except ArtefactError as err:
        raise RequestError(str(err), "mask", params.mask) from err
    return {
        name: np.where(covered[:, None], array, FIELDS[name][0](FIELDS[name][2]))
        for name, array in artefact.arrays.items()
    }


def _add_inline(
    fields: Fields, params: SteerParams, shape: RouterShape, covered: np.ndarray
) -> None:
    """Write the inline edits over the mask's, expert by expert."""
    for name in LISTS:
        for index, (layer, expert, *value) in enumerate(getattr(params, name)):
            row = _row(layer, shape, covered, f"{name}[{index}]")
            _check_expert(expert, shape, f"{name}[{index}]")
            _array(fields, name, shape)[row, expert] = value[0] if value else True
    for layer, experts in params.allow.items():
        row = _row(layer, shape, covered, f"allow.{layer}")
        for index, expert in enumerate(experts):
            _check_expert(expert, shape, f"allow.{layer}[{index}]")
        allow = _array(fields, "allow", shape)
        allow[row] = False
        allow[row, list(experts)] = True


def _array(fields: Fields, name: str, shape: RouterShape) -> np.ndarray:
    if name not in fields:
        dtype, _, neutral = FIELDS[name]
        size = (len(shape.layers), shape.num_experts)
        fields[name] = np.full(size, neutral, dtype)
    return fields[name]


def _row(layer: int, shape: RouterShape, covered: np.ndarray, path: str) -> int:
    """Return where a decoder layer stands in the plan's arrays."""
    if layer not in shape.layers:
        raise RequestError(
            f"expected an MoE layer of this model ({as_ranges(shape.layers)}), "
            f"got {show(layer)}",
            path,
            layer,
        )
    row = shape.layers.index(layer)
    if not covered[row]:
        raise RequestError(
            f"layer {layer} lies outside the request's own layers", path, layer
        )
    return row


def _check_expert(expert: int, shape: RouterShape, path: str) -> None:
    if not 0 <= expert < shape.num_experts:
        raise RequestError(
            f"expected an expert 0..{shape.num_experts - 1}, got {show(expert)}",
            path,
            expert,
        )


def _check_promoted(fields: Fields, params: SteerParams, shape: RouterShape) -> None:
    if "promote" not in fields:
        return
    path = "promote" if params.promote else "mask"
    counts = fields["promote"].sum(axis=1)
    if counts.max() > shape.top_k:
        layer = shape.layers[int(counts.argmax())]
        raise RequestError(
            f"layer {layer}: expected at most {shape.top_k} promoted experts (a token "
            f"uses no more), got {counts.max()}",
            path,
        )
    if "demote" in fields and (both := fields["promote"] & fields["demote"]).any():
        row, expert = np.argwhere(both)[0]
        raise RequestError(
            f"layer {shape.layers[row]} expert {expert} is both promoted and demoted"
            + ("" if params.mask is None else f" (mask {show(params.mask)} included)"),
            path,
        )


def _apply_strength(fields: Fields, strength: float) -> None:
    """Move bias from 0 and scale from 1 by `strength` times their distance."""
    if not {"bias", "scale"} & set(fields):
        raise RequestError(
            "expected bias or scale to apply it to: promote, demote, allow and drop "
            "have no degree",
            "strength",
            strength,
        )
    if "bias" in fields:
        fields["bias"] = fields["bias"] * np.float32(strength)
    if "scale" in fields:
        moved = 1 + np.float32(strength) * (fields["scale"] - 1)
        fields["scale"] = np.maximum(moved, np.float32(0))


def _check_limits(fields: Fields, params: SteerParams) -> None:
    path = "mask" if params.strength is None else "strength"
    for name, limit in (("bias", MAX_BIAS), ("scale", MAX_SCALE)):
        if name in fields and (largest := np.abs(fields[name]).max()) > limit:
            raise RequestError(
                f"takes {name} to {largest:g}, expected at most {limit:g}",
                path,
                getattr(params, path),
            )
