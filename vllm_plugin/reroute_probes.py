# SPDX-License-Identifier: Apache-2.0
"""Rerouting by probes: steps on losses that the engine itself takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from moe_tta.adapter.choice import named_choice
from moe_tta.adapter.rerouting import Outcome, Rerouting, Round
from moe_tta.adapter.spsa import spsa_descent
from moe_tta.plan_edit import PlanEdit
from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin.probes import ProbeJob
from moe_tta.vllm_plugin.reroute_service import as_result
from moe_tta.vllm_plugin.services import Text


def reroute_by_probes(
    text: Text, shape: RouterShape, number: int, arguments: Mapping[str, Any]
) -> ProbeJob:
    """Ask for losses under candidate vectors and step down their estimated slope.

    As `RerouteJob` with `spsa` on the same layers, but that each round draws its
    directions anew: round n with `seed` + n.

    Args:
        text: What the round reads, and the vectors in force.
        shape: The model's routers.
        number: Of the round, from 0.
        arguments: `Rerouting`'s, `layers` among them.
    """
    settings = Rerouting(**arguments)
    delta = torch.zeros(1, len(shape.layers), shape.num_experts)
    if text.edit is not None:
        delta[0] = torch.from_numpy(text.edit.fields["bias"])
    if len(text.tokens) <= max(settings.skip, 1):
        return as_result(Round(Outcome.NO_TARGETS, delta[0], (), ()))
    places = [shape.layers.index(layer) for layer in settings.layers]
    chosen = named_choice((1, len(shape.layers)), places, delta.device)
    asking = spsa_descent(
        delta,
        chosen.float(),
        settings.lr,
        settings.steps,
        settings.clip,
        settings.radius,
        settings.pairs,
        torch.Generator().manual_seed(settings.seed + number),
    )
    done = yield from _answered(asking, settings.skip)
    outcome = Outcome.ADAPTED if done.finite[0] else Outcome.NON_FINITE
    losses = tuple(done.losses[0].tolist())
    layers = tuple(sorted(set(settings.layers)))
    return as_result(Round(outcome, done.delta[0], losses, layers))


def _answered(asking: Any, skip: int) -> Any:
    """Turn points into edits, and tokens' log-probabilities into losses."""
    points = next(asking)
    while True:
        scores = yield [PlanEdit({"bias": point[0].numpy()}) for point in points]
        losses = [-np.mean(found[max(skip - 1, 0) :]) for found in scores]
        try:
            points = asking.send(torch.tensor(losses)[:, None])
        except StopIteration as end:
            return end.value
