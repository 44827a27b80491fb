# SPDX-License-Identifier: Apache-2.0
"""Remix's searches as a service: a distribution that lowers the neighbours' loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from moe_tta.adapter.neighbours import Neighbour, NeighbourTail, last_row_routing
from moe_tta.adapter.remixing import GradientDescent, descend_neighbours, search_alpha
from moe_tta.plan_edit import PlanEdit
from moe_tta.vllm_plugin.services import Result, Text

if TYPE_CHECKING:
    from moe_tta.adapter.model import AdapterModel


class RemixService:
    """Makes a job for each request: its own pathway first, then the search."""

    def __init__(self, model: AdapterModel):
        self._model = model

    def begin(self, texts: Sequence[Text], arguments: Mapping[str, Any]) -> _Job:
        """Return the job that searches from the prompt's own routing."""
        [text] = texts
        return _Job(self._model, text.tokens, arguments)


class _Found(NamedTuple):
    omega: torch.Tensor  # [layers, E]
    finite: bool
    facts: dict[str, Any]


class _Job:
    """Two units: the prompt's pathway and the neighbours' cache; the search."""

    def __init__(
        self,
        model: AdapterModel,
        tokens: Sequence[int],
        arguments: Mapping[str, Any],
    ):
        self._model, self._tokens, self._arguments = model, tokens, arguments
        self._places = [model.shape.layers.index(n) for n in arguments["layers"]]
        self._tail: NeighbourTail | None = None
        self._found: _Found | None = None

    def advance(self) -> None:
        if self._tail is None:
            self._read()
        else:
            search = _SEARCHES[self._arguments["update"]]
            self._found = search(self._tail, self._own, self._arguments)

    def _read(self) -> None:
        own = last_row_routing(self._model, [self._tokens])
        self._own = own[:, self._places]
        self._tail = NeighbourTail(
            self._model,
            [Neighbour(**one) for one in self._arguments["neighbours"]],
            self._arguments["layers"],
        )

    def results(self) -> list[Result]:
        return [self._result()]

    def _result(self) -> Result:
        omega, finite, facts = self._found
        facts["layers"] = list(self._arguments["layers"])
        if not finite:
            return Result("loss or gradient not finite", None, facts)
        shape = self._model.shape
        target = np.zeros((len(shape.layers), shape.num_experts), np.float32)
        target[self._places] = omega.cpu().numpy()
        fields = {"target": target, "mix": target.any(axis=1).astype(np.float32)}
        edit = PlanEdit(fields, tuple(self._arguments["segments"]))
        return Result("adapted", edit, facts)


def _descend(
    tail: NeighbourTail, own: torch.Tensor, arguments: Mapping[str, Any]
) -> _Found:
    done = descend_neighbours(tail, own, GradientDescent(**arguments["descent"]))
    losses = [round(loss, 6) for loss in done.losses[0].tolist()]
    return _Found(done.omega[0], bool(done.finite[0]), {"losses": losses})


def _search(
    tail: NeighbourTail, own: torch.Tensor, arguments: Mapping[str, Any]
) -> _Found:
    borrowed = torch.tensor(arguments["borrowed"])[None]
    line = search_alpha(tail, own, borrowed)
    loss, alpha = float(line.loss[0]), float(line.alpha[0])
    finite = bool(torch.isfinite(line.loss[0]))
    return _Found(line.omega[0], finite, {"losses": [round(loss, 6)], "alpha": alpha})


# by the request's `update`
_SEARCHES: dict[
    str, Callable[[NeighbourTail, torch.Tensor, Mapping[str, Any]], _Found]
] = {"ngd": _descend, "search_alpha": _search}
