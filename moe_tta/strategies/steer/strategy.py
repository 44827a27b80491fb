# SPDX-License-Identifier: Apache-2.0
"""The plan of steer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    covered_layers = zip(shape.layers, covered.tolist(), strict=True)
    row_of = {layer: row for row, (layer, ours) in enumerate(covered_layers) if ours}
    for name in LISTS:
        if entries := getattr(params, name):
            layers, experts, *values = zip(*entries, strict=True)
            rows = [row_of.get(layer) for layer in layers]
            if None in rows or not _all_known(experts, shape):
                raise _first_wrong(name, layers, experts, row_of, shape)
            _array(fields, name, shape)[rows, experts] = values[0] if values else True
    for layer, experts in params.allow.items():
        if layer not in row_of:
            raise _wrong_layer(layer, shape, f"allow.{layer}")
        if not _all_known(experts, shape):
            layers = [layer] * len(experts)
            raise _first_wrong(f"allow.{layer}", layers, experts, row_of, shape)
        allow = _array(fields, "allow", shape)
        allow[row_of[layer]] = False
        allow[row_of[layer], list(experts)] = True


def _array(fields: Fields, name: str, shape: RouterShape) -> np.ndarray:
    if name not in fields:
        dtype, _, neutral = FIELDS[name]
        size = (len(shape.layers), shape.num_experts)
        fields[name] = np.full(size, neutral, dtype)
    return fields[name]


def _all_known(experts: Sequence[int], shape: RouterShape) -> bool:
    return not experts or (min(experts) >= 0 and max(experts) < shape.num_experts)


def _first_wrong(
    name: str,
    layers: Sequence[int],
    experts: Sequence[int],
    row_of: Mapping[int, int],
    shape: RouterShape,
) -> RequestError:
    """Name the first entry of a list that does not fit."""
    index = next(
        index
        for index, (layer, expert) in enumerate(zip(layers, experts, strict=True))
        if layer not in row_of or not _all_known([expert], shape)
    )
    path = f"{name}[{index}]"
    if layers[index] not in row_of:
        return _wrong_layer(layers[index], shape, path)
    expert = experts[index]
    message = f"expected an expert 0..{shape.num_experts - 1}, got {show(expert)}"
    return RequestError(message, path, expert)


def _wrong_layer(layer: int, shape: RouterShape, path: str) -> RequestError:
    message = f"layer {layer} lies outside the request's own layers"
    if layer not in shape.layers:
        message = (
            f"expected an MoE layer of this model ({as_ranges(shape.layers)}), "
            f"got {show(layer)}"
        )
    return RequestError(message, path, layer)


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
