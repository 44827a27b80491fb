# SPDX-License-Identifier: Apache-2.0
"""Rerouting as a service: a round's vectors become the bias of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from moe_tta.adapter.job import RerouteJob
from moe_tta.adapter.rerouting import Outcome, Rerouting, Round
from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin.services import Result, Text

if TYPE_CHECKING:
    from moe_tta.adapter.model import AdapterModel


class RerouteService:
    """Makes rerouting jobs; requests that share one never meet."""

    def __init__(self, model: AdapterModel):
        self._model = model

    def begin(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> _Job:
        """Return the job that adapts the vectors in force to the texts."""
        shape = self._model.shape
        delta = torch.zeros(len(texts), len(shape.layers), shape.num_experts)
        for vectors, text in zip(delta, texts, strict=True):
            if text.edit is not None:
                vectors.copy_(torch.from_numpy(text.edit.fields["bias"]))
        tokens = [text.tokens for text in texts]
        return _Job(RerouteJob(self._model, tokens, delta, Rerouting(**arguments)))


class _Job:
    def __init__(self, job: RerouteJob):
        self._job = job

    def advance(self) -> None:
        self._job.advance()

    def results(self) -> list[Result]:
        return [as_result(done) for done in self._job.result()]


def as_result(done: Round) -> Result:
    """Return a round's vectors as the bias of a plan, its losses as JSON takes them."""
    edit = None
    if done.outcome is Outcome.ADAPTED:
        edit = PlanEdit({"bias": done.delta.cpu().numpy()})
    # JSON has no NaN
    losses = [loss if math.isfinite(loss) else None for loss in done.losses]
    facts = {"losses": losses, "layers": list(done.layers)}
    return Result(done.outcome.value, edit, facts)
