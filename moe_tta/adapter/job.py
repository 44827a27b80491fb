# SPDX-License-Identifier: Apache-2.0
"""A round of online rerouting as work that can be done a unit at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence

import torch

from moe_tta.adapter.model import AdapterModel
from moe_tta.adapter.packing import PackedTexts
from moe_tta.adapter.rerouting import Outcome, Rerouting, Round, round_units


class RerouteJob:
    """Adapts several requests' vectors to their own text, all in one batch.

    Minimises `-(1/(T-1)) sum_t log P(x_{t+1} | x_{<=t}; z + delta)` over the vectors of
    the chosen layers. Never raises for what a request's text or vectors hold. The units
    of a round are those of `Rerouting.passes`; between them nothing is left running.

    Source: Rewiring Experts on the Fly (arXiv 2510.14853).

    Args:
        model: The adapter.
        sequences: Token ids of each request so far.
        delta: [R, L, E] f32 vectors in force, zeros for a fresh request.
        settings: The same for all.
        starts: First position that takes the vectors, for each; 0 by default.
    """

    @torch.inference_mode(False)  # a worker's step runs in it: no gradient passes
    @torch.no_grad()
    def __init__(
        self,
        model: AdapterModel,
        sequences: Sequence[Sequence[int]],
        delta: torch.Tensor,
        settings: Rerouting,
        starts: Sequence[int] | None = None,
    ):
        delta = delta.to(model.device, torch.float32).clone()
        self._results = [
            Round(Outcome.NO_TARGETS, vectors, (), ()) for vectors in delta.unbind()
        ]
        self._usable = [
            index
            for index, sequence in enumerate(sequences)
            if len(sequence) > max(settings.skip, 1)
        ]
        self._running = None
        if self._usable:
            used = [sequences[index] for index in self._usable]
            texts = PackedTexts.of(
                used,
                model.device,
                None if starts is None else [starts[index] for index in self._usable],
                model.passes.extent([len(sequence) for sequence in used]),
            )
            self._running = round_units(model, texts, delta[self._usable], settings)

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self._running is None

    def advance(self, units: int = 1) -> None:
        """Do the next units; none are left once the job is done."""
        with torch.inference_mode(False), torch.no_grad():
            for _ in range(units):
                if self._running is None:
                    return
                self._run_unit(self._running)

    def _run_unit(self, running: Generator) -> None:
        try:
            next(running)
        except StopIteration as end:
            self._finish(end.value)
        except torch.OutOfMemoryError:
            kept = (self._results[index].delta for index in self._usable)
            self._finish([Round(Outcome.OUT_OF_MEMORY, d, (), ()) for d in kept])

    def _finish(self, rounds: Sequence[Round]) -> None:
        for index, done in zip(self._usable, rounds, strict=True):
            self._results[index] = done
        self._running = None

    def result(self) -> list[Round]:
        """Return each request's result; before the end, what it came with."""
        return self._results


def reroute(
    model: AdapterModel,
    sequences: Sequence[Sequence[int]],
    delta: torch.Tensor,
    settings: Rerouting,
    starts: Sequence[int] | None = None,
) -> list[Round]:
    """Run a `RerouteJob` of these arguments to its end."""
    job = RerouteJob(model, sequences, delta, settings, starts)
    while not job.done:
        job.advance()
    return job.result()


def warm_up(model: AdapterModel) -> None:
    """Run a small round, so that no request waits for kernels to be compiled.

    Args:
        model: The adapter. Sizes of texts compile nothing anew; two are moved where
            one is not.
    """
    zeros = torch.zeros(2, len(model.shape.layers), model.shape.num_experts)
    reroute(model, [[0] * 40, [0] * 24], zeros, Rerouting(steps=2))
