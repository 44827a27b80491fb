# SPDX-License-Identifier: Apache-2.0
"""Answer likelihoods under a given routing of one row, with everything else cached.

Exact, by causality: rows before the last prompt token never see the override, so their
keys and values in every layer stay; and below the lowest overridden layer so does the
last prompt token itself. A step therefore runs, above that layer, only the last prompt
token and the answer tokens but the last, each over the cached keys and values. The
answer's first token feels the override through the row's own output, the others
through the keys and values that this row leaves in the layers above.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from moe_tta.adapter.contexts import Contexts, causal_mask
from moe_tta.adapter.errors import AdapterError
from moe_tta.adapter.families import attention_window
from moe_tta.adapter.loss import mean_by_owner, token_nll
from moe_tta.adapter.model import AdapterModel
from moe_tta.adapter.routing import LayerEdit
from moe_tta.kernels.reference import Routing


class Neighbour(NamedTuple):
    """One labelled text, and which request it helps."""

    prompt: Sequence[int]  # token ids
    answer: Sequence[int]  # token ids that follow
    weight: float = 1.0  # K(x_i, x), not negative
    owner: int = 0  # 0 .. Q - 1


class _Recorder:
    """Copies the first `length` keys and values of layers from `first` on.

    Attention sees no change. The copies keep nothing else of a pass alive, as views of
    a joint product would.
    """

    def __init__(self, first: int, length: int):
        self.first, self.length = first, length
        self.kept: dict[int, tuple[torch.Tensor, ...]] = {}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if layer >= self.first:
            self.kept[layer] = tuple(
                part[:, :, : self.length].clone() for part in (keys, values)
            )
        return keys, values


class _Prefix:
    """Puts cached keys and values [N, heads, P, D] before those of a pass."""

    def __init__(self, kept: dict[int, tuple[torch.Tensor, ...]]):
        self._kept = kept

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        old_keys, old_values = self._kept[layer]
        return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for pair in self._kept.values() for part in pair)


class NeighbourTail:
    """N neighbours, cached up to the last prompt token and the lowest chosen layer.

    Args:
        model: The adapter.
        neighbours: Prompts of one token or more, answers of one or more.
        layers: Decoder layers whose distribution is overridden; MoE layers.

    Raises:
        AdapterError: a prompt or answer is empty, or a layer is not one of the model's.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(
        self,
        model: AdapterModel,
        neighbours: Sequence[Neighbour],
        layers: Sequence[int],
    ):
        _check(model, neighbours, layers)
        self.model, self.layers = model, tuple(sorted(layers))
        device = model.device
        self.weights = torch.tensor([n.weight for n in neighbours], device=device)
        self.owners = torch.tensor([n.owner for n in neighbours], device=device)
        last = torch.tensor([len(n.prompt) - 1 for n in neighbours], device=device)
        sizes = torch.tensor([len(n.answer) for n in neighbours], device=device)
        steps = torch.arange(int(sizes.max()), device=device)
        texts = Contexts.of([[*n.prompt, *n.answer] for n in neighbours], device)
        # rows that are run again, [N, S]; padding repeats a text's last row
        rows = (last[:, None] + steps).clamp_max(texts.tokens.shape[1] - 2)
        answered = steps < sizes[:, None]  # [N, S]
        self._targets = texts.tokens.gather(1, rows + 1)[answered]
        self._answered = answered
        self._slots = torch.where(steps == 0, 1 + self.owners[:, None], 0).reshape(-1)
        hidden = self._fill_cache(texts, int(last.max()))
        places = rows[:, :, None].expand(-1, -1, hidden.shape[2])
        self._hidden = hidden.gather(1, places)
        mask = _mask(last, rows, steps, attention_window(model.config))
        self._shared = model.shared(self._hidden, rows, mask, self._prefix)

    def _fill_cache(self, texts: Contexts, length: int) -> torch.Tensor:
        """Run all texts once; return the hidden states before the lowest layer."""
        model, first = self.model, self.layers[0]
        recorder = _Recorder(first, length)
        hidden = model.embed(texts.tokens)
        window = attention_window(model.config)
        mask = causal_mask(hidden.shape[1], window, hidden.device)
        shared = model.shared(hidden, texts.positions, mask, recorder)
        below = model.run(hidden, range(first), shared, {})
        model.run(below, range(first, model.config.num_hidden_layers), shared, {})
        self._prefix = _Prefix(recorder.kept)
        return below

    @property
    def nbytes(self) -> int:
        """Bytes kept between steps: keys, values and hidden states."""
        return self._prefix.nbytes + self._hidden.nbytes

    def nll(self, omega: torch.Tensor) -> torch.Tensor:
        """Return each neighbour's answer NLL, nats a token, [N].

        Args:
            omega: [Q, len(layers), E] f32, each request's distributions for the last
                prompt token of its neighbours.
        """
        model = self.model
        edits = {
            number: LayerEdit(self._slots, target=omega[:, index])
            for index, number in enumerate(self.layers)
        }
        tail = range(self.layers[0], model.config.num_hidden_layers)
        hidden = model.run(self._hidden, tail, self._shared, edits)
        values = token_nll(model, hidden[self._answered], self._targets)
        owners = self._answered.nonzero()[:, 0]
        return mean_by_owner(
            values, owners, len(self._answered), torch.ones_like(values)
        )

    def loss(self, omega: torch.Tensor) -> torch.Tensor:
        """Return each request's surrogate, the neighbours' weighted mean NLL, [Q].

        Source: C3PO (arXiv 2504.07964), L_sur.
        Differs: an answer's loss is its tokens' mean; the paper does not say.
        """
        return mean_by_owner(self.nll(omega), self.owners, len(omega), self.weights)


def _check(
    model: AdapterModel, neighbours: Sequence[Neighbour], layers: Sequence[int]
) -> None:
    if not neighbours or not all(len(n.prompt) and len(n.answer) for n in neighbours):
        raise AdapterError("a neighbour needs a prompt and an answer of one token each")
    if not layers or not set(layers) <= set(model.shape.layers):
        raise AdapterError(
            f"layers {list(layers)} are not MoE layers of this model, which are "
            f"{list(model.shape.layers)}"
        )


def _mask(
    last: torch.Tensor, rows: torch.Tensor, steps: torch.Tensor, window: int | None
) -> torch.Tensor:
    """Return which keys each row sees, [N, 1, S, P + S] bool: prefix, then own rows."""
    before = torch.arange(int(last.max()), device=last.device).expand(len(last), -1)
    keys = torch.cat([before, rows], dim=1)  # [N, P + S] positions
    real = torch.cat(
        [before < last[:, None], torch.ones_like(rows, dtype=torch.bool)], dim=1
    )
    order = torch.cat([torch.full_like(before, -1), steps.expand_as(rows)], dim=1)
    sees = real[:, None, :] & (order[:, None, :] <= steps[None, :, None])
    if window is not None:
        sees &= rows[:, :, None] - keys[:, None, :] < window
    return sees[:, None]


@torch.inference_mode(False)
@torch.no_grad()
def last_row_routing(
    model: AdapterModel, prompts: Sequence[Sequence[int]]
) -> torch.Tensor:
    """Return the routers' distributions at each prompt's last token, [R, L, E] f32.

    Source: C3PO's pathway of a sample (arXiv 2504.07964): softmax over all experts.
    """
    contexts = Contexts.of(prompts, model.device)
    found: list[torch.Tensor] = []
    picked = torch.arange(len(prompts), device=model.device)
    picked = picked * contexts.tokens.shape[1] + contexts.lengths - 1

    def watch(number: int, logits: torch.Tensor, chosen: Routing) -> None:
        found.append(torch.softmax(logits[picked].float(), dim=1))

    hidden = model.embed(contexts.tokens)
    window = attention_window(model.config)
    mask = causal_mask(hidden.shape[1], window, hidden.device)
    shared = model.shared(hidden, contexts.positions, mask)
    model.run(hidden, range(model.shape.layers[-1] + 1), shared, {}, watch)
    return torch.stack(found, dim=1)
