# SPDX-License-Identifier: Apache-2.0
"""Rerouting's forward: lower layers once a round, the tail once a step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_tta.adapter.contexts import causal_mask
from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.families import attention_window
from moe_tta.adapter.graphs import Size
from moe_tta.adapter.loss import token_nll
from moe_tta.adapter.model import AdapterModel, Shared
from moe_tta.adapter.packing import PackedTexts, Packing
from moe_tta.adapter.routing import LayerEdit
from moe_tta.kernels.reference import Routing


class Survey(NamedTuple):
    """What one plain pass over R packed texts leaves; L MoE layers, N rows."""

    inputs: list[torch.Tensor]  # L times [1, N, H]: hidden states before the layer
    uncertainty: torch.Tensor  # [R, L] f32, C_l in nats


def delta_edits(
    model: AdapterModel, delta: torch.Tensor, slots: torch.Tensor
) -> dict[int, LayerEdit]:
    """Return each MoE layer's edit for vectors [R, L, E] and row slots [N]."""
    # unbound at once: one gradient is made of all layers', instead of one for each
    return {
        number: LayerEdit(slots, bias=bias)
        for number, bias in zip(model.shape.layers, delta.unbind(1), strict=True)
    }


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
    packing, padding = texts.packing, texts.packing.places < 0
    count, num_layers = len(texts.lengths), len(model.shape.layers)
    sums = torch.zeros(count, num_layers, device=model.device)
    places = {number: index for index, number in enumerate(model.shape.layers)}
    shifts = torch.cat([torch.zeros_like(delta[:1]), delta])

    def watch(number: int, logits: torch.Tensor, chosen: Routing) -> None:
        shifted = logits.float() + shifts[texts.slots, places[number]]
        logs = torch.log_softmax(shifted, dim=1).gather(1, chosen.topk_ids.long())
        means = packing.spread(-logs.mean(dim=1)[None])
        sums[:, places[number]] = torch.where(padding, 0.0, means).sum(dim=1)

    hidden = model.embed(texts.tokens)
    shared = _shared(model, hidden, texts.positions, packing)
    edits = delta_edits(model, delta, texts.slots)
    inputs = []
    for number in range(model.shape.layers[-1] + 1):
        if number in places:
            inputs.append(hidden)
        hidden = model.run(hidden, range(number, number + 1), shared, edits, watch)
    return Survey(inputs, sums / texts.lengths[:, None])


def _shared(
    model: AdapterModel,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    packing: Packing,
) -> Shared:
    length = packing.places.shape[1]
    mask = causal_mask(length, attention_window(model.config), hidden.device)
    return model.shared(hidden, positions, mask, packing=packing)


class Tail:
    """Layers from the lowest chosen one on, above activations that stay as they are.

    Args:
        model: The adapter.
        texts: R of them.
        hidden: [1, N, H] before MoE layer `lowest`, from `survey`.
        lowest: Position in `shape.layers` of the lowest layer to take gradients in.
        skip: Tokens at the head of each text that are not scored.
        recompute: See `AdapterModel.run`.
    """

    def __init__(
        self,
        model: AdapterModel,
        texts: PackedTexts,
        hidden: torch.Tensor,
        lowest: int,
        skip: int,
        recompute: bool = False,
    ):
        self._model, self._recompute = model, recompute
        self._first = model.shape.layers[lowest]
        self._inputs = (
            hidden,
            texts.positions,
            texts.slots,
            texts.tokens.roll(-1, dims=1).reshape(-1),
            texts.scored(skip),
            *texts.packing,
        )
        self._size = (*texts.size, self._first, recompute)

    def loss(self, delta: torch.Tensor) -> torch.Tensor:
        """Return each request's next-token cross-entropy in nats, [R].

        NaN for a request without a scored token.

        Args:
            delta: [R, L, E] f32 vectors of all MoE layers; those below the tail are
                not read, since their work is in the activations.
        """
        return self._loss(*self._inputs, delta)

    @torch.no_grad()
    def value(self, delta: torch.Tensor) -> torch.Tensor:
        """Return the same without gradients, perhaps by a CUDA graph."""

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor]:
            return (self._loss(*tensors),)

        size = Size("value", *self._size)
        (losses,) = self._model.passes.call(size, run, (*self._inputs, delta))
        return losses.clone()

    def gradient(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return losses [R] and their gradients [R, L, E], perhaps by a CUDA graph."""

        def run(*tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            *inputs, vectors = tensors
            return autograd_gradient(lambda leaf: self._loss(*inputs, leaf))(vectors)

        size = Size("gradient", *self._size)
        losses, slope = self._model.passes.call(size, run, (*self._inputs, delta))
        return losses.clone(), slope.clone()

    def _loss(self, *tensors: torch.Tensor) -> torch.Tensor:
        hidden, positions, slots, targets, scored, *parts, delta = tensors
        model, packing = self._model, Packing(*parts)
        layers = range(self._first, model.config.num_hidden_layers)
        edits = delta_edits(model, delta, slots)
        shared = _shared(model, hidden, positions, packing)
        hidden = model.run(hidden, layers, shared, edits, recompute=self._recompute)
        values = packing.spread(token_nll(model, hidden[0], targets)[None])
        return torch.where(scored, values, 0.0).sum(dim=1) / scored.sum(dim=1)
