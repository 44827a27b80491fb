# SPDX-License-Identifier: Apache-2.0
"""Expert assignments that make labelled texts likelier, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch

from moe_tta.adapter.contexts import Contexts, causal_mask
from moe_tta.adapter.descent import autograd_gradient, descend
from moe_tta.adapter.errors import AdapterError
from moe_tta.adapter.loss import mean_by_owner, token_nll
from moe_tta.adapter.model import AdapterModel, Watch
from moe_tta.adapter.routing import LayerEdit
from moe_tta.kernels.reference import Routing

SLOT_BLOCK = 64  # tables of edits are kept by their size, so few sizes are used


class LabelledText(NamedTuple):
    """A text whose tokens from `first` on should be likely."""

    tokens: Sequence[int]
    first: int  # 1 or more


@dataclass(frozen=True)
class TokenDescent:
    """How assignments are sought; 0 steps keep the router's own.

    Source: kNN-MoE (arXiv 2601.02144) names no numbers that could be confirmed: these
    are ours.

    Attributes:
        steps: Steps of Adam.
        lr: Logits a step.
        clip: Largest |change| of a logit.
    """

    steps: int = 10
    lr: float = 0.1
    clip: float = 4.0


class Assigned(NamedTuple):
    """What n scored rows of R texts ended with; a row predicts the token after it."""

    owners: torch.Tensor  # [n] int64, which text
    positions: torch.Tensor  # [n] int64, of the row
    keys: torch.Tensor  # [L, n, H], what the unedited model's routers were given
    ids: torch.Tensor  # [L, n, K] int64
    weights: torch.Tensor  # [L, n, K] f32, as the model weighs its experts
    losses: torch.Tensor  # [R, 2] nats a token: the model's own, and with these
    improved: torch.Tensor  # [R] bool; the others kept the router's assignments


@torch.inference_mode(False)
@torch.no_grad()
def assign_tokens(
    model: AdapterModel, texts: Sequence[LabelledText], settings: TokenDescent
) -> Assigned:
    """Change scored rows' routing logits in every MoE layer to lower the texts' loss.

    Source: kNN-MoE, arXiv 2601.02144: token-wise routing logits optimised for the
    likelihood of the reference text; keys are the frozen model's router inputs, values
    the sparse assignment after softmax.
    Differs: a change is added to the router's logits, and all rows and layers of a
    text move together; a text whose loss did not fall keeps the router's own.

    Args:
        model: The adapter.
        texts: Two tokens or more each, right answers at their end.
        settings: Steps and rates.

    Raises:
        AdapterError: a text has no token to score.
    """
    batch = _Batch(model, texts)
    num_layers, num_experts = len(model.shape.layers), model.shape.num_experts
    start = torch.zeros(
        len(texts), num_layers, batch.length * num_experts, device=model.device
    )
    done = descend(
        autograd_gradient(batch.loss),
        batch.loss,
        start,
        torch.ones(len(texts), num_layers, device=model.device),
        "adam",
        settings.lr,
        settings.steps,
        settings.clip,
    )
    before, after = done.losses[:, 0], done.losses[:, -1]
    improved = done.finite & (after < before)
    delta = torch.where(improved[:, None, None], done.delta, 0.0)
    ids, weights = batch.routing(delta)
    return Assigned(
        batch.owners,
        batch.rows % batch.length,
        batch.router_inputs(),
        ids,
        weights,
        torch.stack([before, torch.where(improved, after, before)], dim=1),
        improved,
    )


class _Batch:
    """R texts, their n scored rows, and passes over them."""

    def __init__(self, model: AdapterModel, texts: Sequence[LabelledText]):
        if not all(1 <= text.first < len(text.tokens) for text in texts):
            raise AdapterError("a text needs a token to score after its first one")
        self._model = model
        self._contexts = Contexts.of([text.tokens for text in texts], model.device)
        self.length = self._contexts.tokens.shape[1]
        first = torch.tensor([text.first for text in texts], device=model.device)
        following = self._contexts.positions + 1
        scored = following >= first[:, None]
        scored &= following < self._contexts.lengths[:, None]
        self.rows = scored.reshape(-1).nonzero()[:, 0]
        self.owners = self.rows // self.length
        self._targets = self._contexts.tokens.roll(-1, 1).reshape(-1)[self.rows]
        self._slots = torch.zeros(scored.numel(), dtype=torch.int64)
        self._slots = self._slots.to(model.device)
        self._slots[self.rows] = 1 + torch.arange(len(self.rows), device=model.device)

    def loss(self, delta: torch.Tensor) -> torch.Tensor:
        """Return each text's mean loss in nats a scored token, [R].

        Args:
            delta: [R, L, T E] f32 changes of the logits.
        """
        hidden = self._run(self._edits(delta)).flatten(0, 1)[self.rows]
        values = token_nll(self._model, hidden, self._targets)
        ones = torch.ones_like(values)
        return mean_by_owner(values, self.owners, len(delta), ones)

    def routing(self, delta: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scored rows' expert ids and weights, [L, n, K] each."""
        found: list[Routing] = []
        self._run(self._edits(delta), lambda _, __, chosen: found.append(chosen))
        ids = torch.stack([chosen.topk_ids[self.rows] for chosen in found])
        weights = torch.stack([chosen.topk_weights[self.rows] for chosen in found])
        return ids.long(), weights

    def router_inputs(self) -> torch.Tensor:
        """Return what the unedited model gives its routers, [L, n, H]."""
        kept: list[torch.Tensor] = []

        def keep(rows: torch.Tensor, module: torch.nn.Module, inputs: tuple) -> None:
            kept.append(inputs[0].reshape(-1, inputs[0].shape[-1])[rows])

        layers = [self._model.layers[number] for number in self._model.shape.layers]
        hook = partial(keep, self.rows)
        handles = [layer.mlp.gate.register_forward_pre_hook(hook) for layer in layers]
        try:
            self._run({})
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack(kept)

    def _edits(self, delta: torch.Tensor) -> dict[int, LayerEdit]:
        num_experts = self._model.shape.num_experts
        unused = -len(self.rows) % SLOT_BLOCK
        edits = {}
        for index, number in enumerate(self._model.shape.layers):
            bias = delta[:, index].reshape(-1, num_experts)[self.rows]
            bias = torch.nn.functional.pad(bias, (0, 0, 0, unused))
            edits[number] = LayerEdit(self._slots, bias=bias)
        return edits

    def _run(
        self, edits: dict[int, LayerEdit], watch: Watch | None = None
    ) -> torch.Tensor:
        model = self._model
        hidden = model.embed(self._contexts.tokens)
        window = getattr(model.config, "sliding_window", None)
        mask = causal_mask(hidden.shape[1], window, hidden.device)
        shared = model.shared(hidden, self._contexts.positions, mask)
        layers = range(model.config.num_hidden_layers)
        # every layer is edited, so every layer's activations would be kept
        return model.run(hidden, layers, shared, edits, watch, recompute=True)
