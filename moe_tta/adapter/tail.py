# SPDX-License-Identifier: Apache-2.0
"""Rerouting's forward: lower layers once a round, the tail once a step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from moe_tta.adapter.contexts import Contexts, causal_mask
from moe_tta.adapter.families import attention_window
from moe_tta.adapter.loss import mean_by_owner, token_nll
from moe_tta.adapter.model import AdapterModel, Shared
from moe_tta.adapter.routing import LayerEdit
from moe_tta.kernels.reference import Routing


class Survey(NamedTuple):
    """What one plain pass over the contexts leaves; L MoE layers, R requests."""

    inputs: list[torch.Tensor]  # L times [R, T, H]: hidden states before the layer
    uncertainty: torch.Tensor  # [R, L] f32, C_l in nats


def delta_edits(
    model: AdapterModel, delta: torch.Tensor, slots: torch.Tensor
) -> dict[int, LayerEdit]:
    """Return each MoE layer's edit for vectors [R, L, E] and row slots [R T]."""
    # unbound at once: one gradient is made of all layers', instead of one for each
    return {
        number: LayerEdit(slots, bias=bias)
        for number, bias in zip(model.shape.layers, delta.unbind(1), strict=True)
    }


@torch.no_grad()
def survey(model: AdapterModel, contexts: Contexts, delta: torch.Tensor) -> Survey:
    """Run the contexts once, without gradients, and score the layers.

    `C_l = -(1/k) sum_j log p_lj` over the k chosen experts, averaged over the context.

    Source: Rewiring Experts on the Fly (arXiv 2510.14853).
    Differs: the average over tokens is ours; the paper's is unconfirmed.

    Args:
        model: The adapter.
        contexts: R sequences.
        delta: [R, L, E] vectors in force.
    """
    real = contexts.real
    sums = torch.zeros(len(real), len(model.shape.layers), device=model.device)
    places = {number: index for index, number in enumerate(model.shape.layers)}
    shifts = torch.cat([torch.zeros_like(delta[:1]), delta])
    slots = contexts.slots()

    def watch(number: int, logits: torch.Tensor, chosen: Routing) -> None:
        shifted = logits.float() + shifts[slots, places[number]]
        logs = torch.log_softmax(shifted, dim=1).gather(1, chosen.topk_ids.long())
        rows = -logs.mean(dim=1).view(real.shape)
        sums[:, places[number]] = torch.where(real, rows, 0.0).sum(dim=1)

    hidden = model.embed(contexts.tokens)
    shared = _shared(model, contexts, hidden)
    edits = delta_edits(model, delta, slots)
    inputs = []
    for number in range(model.shape.layers[-1] + 1):
        if number in places:
            inputs.append(hidden)
        hidden = model.run(hidden, range(number, number + 1), shared, edits, watch)
    return Survey(inputs, sums / contexts.lengths[:, None])


def _shared(model: AdapterModel, contexts: Contexts, hidden: torch.Tensor) -> Shared:
    window = attention_window(model.config)
    mask = causal_mask(hidden.shape[1], window, hidden.device)
    return model.shared(hidden, contexts.positions, mask)


class Tail:
    """Layers from the lowest chosen one on, above activations that stay as they are.

    Args:
        model: The adapter.
        contexts: R sequences.
        hidden: [R, T, H] before MoE layer `lowest`, from `survey`.
        lowest: Position in `shape.layers` of the lowest layer to take gradients in.
        skip: Tokens at the head of each context that are not scored.
        recompute: See `AdapterModel.run`.
    """

    def __init__(
        self,
        model: AdapterModel,
        contexts: Contexts,
        hidden: torch.Tensor,
        lowest: int,
        skip: int,
        recompute: bool = False,
    ):
        self._model, self._hidden, self._recompute = model, hidden, recompute
        first = model.shape.layers[lowest]
        self._layers = range(first, model.config.num_hidden_layers)
        self._shared = _shared(model, contexts, hidden)
        self._slots = contexts.slots()
        scored = contexts.scored(skip)
        self._rows = scored.reshape(-1).nonzero()[:, 0]  # [N]
        self._owners = self._rows // scored.shape[1]
        following = contexts.tokens.roll(-1, dims=1)
        self._targets = following.reshape(-1)[self._rows]

    def loss(self, delta: torch.Tensor) -> torch.Tensor:
        """Return each request's next-token cross-entropy in nats, [R].

        NaN for a request without a scored token.

        Args:
            delta: [R, L, E] f32 vectors of all MoE layers; those below the tail are
                not read, since their work is in the activations.
        """
        edits = delta_edits(self._model, delta, self._slots)
        hidden = self._model.run(
            self._hidden, self._layers, self._shared, edits, recompute=self._recompute
        )
        rows = hidden.flatten(0, 1).index_select(0, self._rows)
        values = token_nll(self._model, rows, self._targets)
        return mean_by_owner(values, self._owners, len(delta), torch.ones_like(values))
