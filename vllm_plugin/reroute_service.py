# SPDX-License-Identifier: Apache-2.0
"""Rerouting as a service: a round's vectors become the bias of a plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from moe_tta.adapter.job import RerouteJob
from moe_tta.adapter.rerouting import Outcome, Rerouting
from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin.services import Result

if TYPE_CHECKING:
    from moe_tta.adapter.model import AdapterModel


class RerouteService:
    """Makes rerouting jobs, one request each: padding would change roundings."""

    def __init__(self, model: AdapterModel):
        self._model = model

    def begin(
        self,
        tokens: Sequence[int],
        arguments: Mapping[str, Any],
        edit: PlanEdit | None,
    ) -> _Job:
        """Return the job that adapts the vectors in force to a text."""
        shape = self._model.shape
        delta = torch.zeros(1, len(shape.layers), shape.num_experts)
        if edit is not None:
            delta[0] = torch.from_numpy(edit.fields["bias"])
        return _Job(RerouteJob(self._model, [tokens], delta, Rerouting(**arguments)))


class _Job:
    def __init__(self, job: RerouteJob):
        self._job = job

    def advance(self) -> None:
        self._job.advance()

    def result(self) -> Result:
        [done] = self._job.result()
        edit = None
        if done.outcome is Outcome.ADAPTED:
            edit = PlanEdit({"bias": done.delta.cpu().numpy()})
        # JSON has no NaN
        losses = [loss if math.isfinite(loss) else None for loss in done.losses]
        facts = {"losses": losses, "layers": list(done.layers)}
        return Result(done.outcome.value, edit, facts)
