# SPDX-License-Identifier: Apache-2.0
"""The layers that a round of rerouting runs in every step."""

from __future__ import annotations

import torch

from moe_tta.adapter.contexts import causal_mask
from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.families import attention_window
from moe_tta.adapter.graphs import Size
from moe_tta.adapter.loss import token_nll
from moe_tta.adapter.model import AdapterModel, Shared
from moe_tta.adapter.packing import PackedTexts, Packing
from moe_tta.adapter.routing import LayerEdit


def delta_edits(
    model: AdapterModel, delta: torch.Tensor, slots: torch.Tensor
) -> dict[int, LayerEdit]:
    """Return each MoE layer's edit for vectors [R, L, E] and row slots [N]."""
    # unbound at once: one gradient is made of all layers', instead of one for each
    return {
        number: LayerEdit(slots, bias=bias)
        for number, bias in zip(model.shape.layers, delta.unbind(1), strict=True)
    }


def shared_by_texts(
    model: AdapterModel,
    hidden: torch.Tensor,
    positions: torch.Tensor,
    packing: Packing,
) -> Shared:
    """Prepare a pass over packed texts: hidden states [1, N, H] at positions [1, N]."""
    length = packing.places.shape[1]
    mask = causal_mask(length, attention_window(model.config), hidden.device)
    return model.shared(hidden, positions, mask, packing=packing)


def text_losses(
    model: AdapterModel,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    scored: torch.Tensor,
    packing: Packing,
) -> torch.Tensor:
    """Return each text's mean -log P in nats, [R]; NaN for one without a scored token.

    Args:
        model: The adapter.
        hidden: [1, N, H] after the last layer.
        targets: [N] token ids.
        scored: [R, T] bool, positions that count.
        packing: Of the rows.
    """
    values = packing.spread(token_nll(model, hidden[0], targets)[None])
    return torch.where(scored, values, 0.0).sum(dim=1) / scored.sum(dim=1)


class Tail:
    """Layers from the lowest chosen one on, above activations that stay as they are.

    Args:
        model: The adapter.
        texts: R of them.
        hidden: [1, N, H] before MoE layer `lowest`, from `survey` or `opening`.
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
            texts.targets,
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
        shared = shared_by_texts(model, hidden, positions, packing)
        hidden = model.run(hidden, layers, shared, edits, recompute=self._recompute)
        return text_losses(model, hidden, targets, scored, packing)
