# SPDX-License-Identifier: Apache-2.0
"""A round's first pass: which layers to adapt, and the inputs of all layers."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.graphs import Size
from moe_tta.adapter.model import AdapterModel
from moe_tta.adapter.packing import PackedTexts, Packing
from moe_tta.adapter.tail import delta_edits, shared_by_texts, text_losses
from moe_tta.kernels.reference import Routing


class Survey(NamedTuple):
    """What one pass over R packed texts leaves; L MoE layers, N rows."""

    inputs: dict[int, torch.Tensor]  # before each `starts` layer: [1, N, H]
    uncertainty: torch.Tensor  # [R, L] f32, C_l in nats

    def below(self, lowest: int) -> tuple[int, torch.Tensor]:
        """Return the last layer at or below `lowest` whose input was kept, and that.

        Layers are positions in the model's MoE layers.
        """
        place = max(place for place in self.inputs if place <= lowest)
        return place, self.inputs[place]


class Opening(NamedTuple):
    """A survey that was a step, too."""

    survey: Survey
    losses: torch.Tensor  # [R] nats, at the vectors in force
    slope: torch.Tensor  # [R, L, E], their gradients; 0 below the lowest layer


@torch.no_grad()
def survey(model: AdapterModel, texts: PackedTexts, delta: torch.Tensor) -> Survey:
    """Run the texts once, without gradients, and score the layers.

    `C_l = -(1/k) sum_j log p_lj` over the k chosen experts, averaged over the text.

    Source: Rewiring Experts on the Fly (arXiv 2510.14853).
    Differs: the average over tokens is ours; the paper's is unconfirmed.

    Args:
        model: The adapter.
        texts: R of them.
        delta: [R, L, E] vectors in force.
    """
    return _Reading(model, texts, delta).read(0)[1]


@torch.no_grad()
def opening(
    model: AdapterModel,
    texts: PackedTexts,
    delta: torch.Tensor,
    skip: int,
    lowest: int = 0,
    recompute: bool = False,
) -> Opening:
    """Do so and take the gradient there in the same pass, perhaps by a CUDA graph.

    Where that is a graph, the inputs hold until the next opening.

    Args:
        model: The adapter.
        texts: R of them.
        delta: [R, L, E] vectors in force.
        skip: Tokens at the head of each text that are not scored.
        lowest: Position of the lowest MoE layer that takes gradients.
        recompute: See `AdapterModel.run`.
    """
    starts = model.passes.starts(texts.size[2], len(model.shape.layers))

    def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        *plain, targets, scored, places, columns, vectors = tensors
        inside = PackedTexts(*plain, Packing(places, columns))
        found = []

        def losses(leaf: torch.Tensor) -> torch.Tensor:
            hidden, surveyed = _Reading(model, inside, leaf).read(lowest, recompute)
            found.append(surveyed)
            return text_losses(model, hidden, targets, scored, inside.packing)

        slope = autograd_gradient(losses)(vectors)
        return *slope, found[0].uncertainty, *found[0].inputs.values()

    size = Size("opening", *texts.size, lowest, recompute)
    *plain, packing = texts
    inputs = *plain, texts.targets, texts.scored(skip), *packing, delta
    losses, slope, uncertainty, *kept = model.passes.call(size, run, inputs)
    surveyed = Survey(dict(zip(starts, kept, strict=True)), uncertainty.clone())
    return Opening(surveyed, losses.clone(), slope.clone())


class _Reading:
    """One pass over all layers, which watches their routers."""

    def __init__(self, model: AdapterModel, texts: PackedTexts, delta: torch.Tensor):
        self._model, self._texts, self._delta = model, texts, delta
        self._places = {number: i for i, number in enumerate(model.shape.layers)}
        vectors = delta.detach()
        self._shifts = torch.cat([torch.zeros_like(vectors[:1]), vectors])
        self._sums = torch.zeros(delta.shape[:2], device=model.device)

    def read(self, lowest: int, recompute: bool = False) -> tuple[torch.Tensor, Survey]:
        """Return hidden states [1, N, H] after the last layer, and the survey.

        Gradients, where they are enabled, are those of MoE layers from `lowest` on.
        """
        model, texts = self._model, self._texts
        hidden = model.embed(texts.tokens)
        shared = shared_by_texts(model, hidden, texts.positions, texts.packing)
        edits = delta_edits(model, self._delta, texts.slots)
        starts = model.passes.starts(texts.size[2], len(self._places))
        inputs: dict[int, torch.Tensor] = {}
        wanted = torch.is_grad_enabled()
        for number in range(model.config.num_hidden_layers):
            place = self._places.get(number)
            if place in starts:
                kept = model.passes.keep(hidden.detach(), len(inputs))
                inputs[place] = kept
            layer = range(number, number + 1)
            with torch.set_grad_enabled(
                wanted and number >= model.shape.layers[lowest]
            ):
                hidden = model.run(hidden, layer, shared, edits, self._watch, recompute)
        return hidden, Survey(inputs, self._sums / texts.lengths[:, None])

    @torch.no_grad()
    def _watch(self, number: int, logits: torch.Tensor, chosen: Routing) -> None:
        place, packing = self._places[number], self._texts.packing
        shifted = logits.float() + self._shifts[self._texts.slots, place]
        logs = torch.log_softmax(shifted, dim=1).gather(1, chosen.topk_ids.long())
        means = packing.spread(-logs.mean(dim=1)[None])
        means = torch.where(packing.places < 0, 0.0, means)
        self._sums[:, place] = means.sum(dim=1)
