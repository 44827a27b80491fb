# SPDX-License-Identifier: Apache-2.0
"""How much a step keeps and makes beside the weights, in bytes."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.packing import PackedTexts
from moe_tta.adapter.survey import survey
from moe_tta.adapter.tail import Tail
from tests.adapter.test_rounds import zeros


class _Largest(TorchDispatchMode):
    """Counts bytes of every tensor that operators make, views aside."""

    def __init__(self, old):
        super().__init__()
        self.known, self.largest = set(old), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else [made]:
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.largest = max(self.largest, storage.nbytes())
        return made


def saved_bytes(tail, delta, weights):
    """Return the bytes that one forward keeps for backward, weights aside."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = tail.loss(delta.requires_grad_())
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("lengths", [(48,), (48, 9, 21)], ids=str)
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_grows_with_rows_and_not_with_weights(adapter, draw, lengths, recompute):
    """Kept for backward: a bound per row and layer; no operator makes a weight's copy.

    Per row and layer at most: 16 vectors of H outside the experts (residuals, the two
    norms in float32 and out, q, k, v before and after rotation, attention), and for
    each of K experts 3 of H (rows in, out, weighted) and 5 of I; 6 of E for routing.
    Several texts have 4 of H more for each position of attention, padding included:
    q, k, v and the result.
    Recomputing keeps the layer's input alone.
    """
    texts = [draw.tokens(length) for length in lengths]
    texts = PackedTexts.of(texts, adapter.device)
    count, longest, rows = texts.size
    start = zeros(adapter, count)
    hidden = survey(adapter, texts, start).inputs[0]
    tail = Tail(adapter, texts, hidden, 0, 0, recompute)
    weights = {w.untyped_storage().data_ptr() for _, w in adapter.weights()}
    config = adapter.config
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or 32)
    width = max(config.hidden_size, heads)
    routed = adapter.shape.top_k * (3 * width + 5 * inner + 4)
    row = (
        2 * width if recompute else 16 * width + routed + 6 * adapter.shape.num_experts
    )
    padded = 0 if recompute or count == 1 else count * longest * 4 * width
    per_layer = 4 * (rows * row + padded)
    tables = 4 * 2 * (count + 1) * adapter.shape.num_experts  # S + 1 rows of each edit
    head = 4 * rows * 3 * width  # input of the loss, and the rope's tables
    kept = saved_bytes(tail, start, weights)
    assert kept <= len(adapter.layers) * (per_layer + tables) + head
    with _Largest(weights) as seen:
        autograd_gradient(tail.loss)(zeros(adapter, count))
    experts = adapter.shape.num_experts * 3 * inner * config.hidden_size * 4
    logits = 4 * rows * config.vocab_size
    assert seen.largest <= max(logits, 4 * rows * routed, 4 * count * longest * width)
    assert seen.largest < experts


@pytest.mark.parametrize("window", [None, 8])
def test_attention_alone_pads(adapter, draw, window):
    """A position of T keeps q, k, v, the result and a logarithm for each query head.

    In all layers but the lowest, whose attention has no gradient; and where a position
    is found, once for all. With a window there are keys for each query head and a mask.
    """
    config, lengths, kept, wanted = adapter.config, (40, 56), [], []
    config.sliding_window = window
    texts = [draw.tokens(length) for length in (40, 9, 21)]
    weights = {w.untyped_storage().data_ptr() for _, w in adapter.weights()}
    queries, keys = config.num_attention_heads, config.num_key_value_heads
    heads = 2 * (queries + (queries if window else keys))
    numbers = heads * adapter.layers[0].self_attn.head_dim + queries
    start = zeros(adapter, 3)
    for length in lengths:
        packed = PackedTexts.of(texts, adapter.device, extent=(70, length))
        hidden = survey(adapter, packed, start).inputs[0]
        kept.append(saved_bytes(Tail(adapter, packed, hidden, 0, 0), start, weights))
        layer = 4 * (3 * length * numbers + (length**2 if window else 0))
        wanted.append((len(adapter.layers) - 1) * layer + 9 * 3 * length)
    assert kept[1] - kept[0] == wanted[1] - wanted[0]
