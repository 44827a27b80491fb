# SPDX-License-Identifier: Apache-2.0
"""A token store: router inputs of reference tokens and the experts that suit them.

The memory of kNN-MoE (arXiv 2601.02144): in each MoE layer a key (the router's input
at a reference token) and a value (a sparse assignment to experts).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moe_tta.remix.card import CARD_FILE, ModelCard, TokenCard
from moe_tta.remix.errors import StoreError
from moe_tta.remix.folder import check_files, check_model, read_card
from moe_tta.remix.shards import Shard

KEY_BYTES, VALUE_BYTES = 8, 4  # in an engine: float64 keys, dense float32 values
LENGTH_ERROR = 1e-3  # of a unit key stored in float16
SUM_ERROR = 1e-5  # of an assignment's float32 weights


class TokenLayer(NamedTuple):
    """One layer's N tokens with K experts each."""

    keys: np.ndarray  # [N, H] float32 or float16, of length 1
    ids: np.ndarray  # [N, K] int64
    weights: np.ndarray  # [N, K] float32 >= 0, sums of 1 at most


@dataclass(frozen=True, eq=False)
class TokenStore:
    """An open token store; read one with `load_tokens`."""

    path: Path
    card: TokenCard

    def __len__(self) -> int:
        return self.card.counts.tokens

    def check(self, model: ModelCard) -> None:
        """Refuse a model other than the one whose routers these keys met.

        Raises:
            StoreError: names every difference.
        """
        check_model(self.path, self.card.model, model)

    def layer(self, number: int) -> TokenLayer:
        """Read one decoder layer of those in `card.layers`.

        Raises:
            StoreError: the file is not of the card's shape, or its numbers are none
                that a store may hold.
        """
        shard = Shard(self.path / layer_file(number))
        rows, card = len(self), self.card
        want = {
            "keys": ((rows, card.hidden_size), card.precision),
            "ids": ((rows, card.model.top_k), "int64"),
            "weights": ((rows, card.model.top_k), "float32"),
        }
        for name, (shape, dtype) in want.items():
            got = shard.shape(name), str(shard.dtype(name))
            if got != (shape, dtype):
                raise StoreError(
                    f"{shard.path}: {name} is {got[1]} {got[0]}, expected {dtype} "
                    f"{shape}"
                )
        layer = TokenLayer(*(shard.rows(name, 0, rows) for name in TokenLayer._fields))
        try:
            check_layer(layer, card.model.num_experts)
        except StoreError as err:
            raise StoreError(f"{shard.path}: {err}") from err
        return layer

    def layers(self) -> Iterator[tuple[int, TokenLayer]]:
        """Read all layers, one at a time."""
        for number in self.card.layers:
            yield number, self.layer(number)


def layer_file(number: int) -> str:
    """Return the file name of a decoder layer."""
    return f"layer-{number:05d}.safetensors"


def memory_bytes(
    num_layers: int, tokens: int, hidden_size: int, num_experts: int
) -> int:
    """Return the bytes that an engine holds for a store."""
    one = KEY_BYTES * hidden_size + VALUE_BYTES * num_experts
    return num_layers * tokens * one


def load_tokens(path: str | Path) -> TokenStore:
    """Open a token store after checking every file and every number in it.

    Raises:
        StoreError: a file is missing, damaged, or not of the card's shape.
    """
    store = open_tokens(path)
    for _ in store.layers():
        pass
    return store


def open_tokens(path: str | Path) -> TokenStore:
    """Open a token store whose layers will be read, and so checked, by the caller.

    Raises:
        StoreError: a file is missing or damaged, or the card contradicts itself.
    """
    folder = Path(path)
    card = read_card(folder)
    if not isinstance(card, TokenCard):
        raise StoreError(f"{folder}: holds questions, not single tokens")
    held = memory_bytes(
        len(card.layers), card.counts.tokens, card.hidden_size, card.model.num_experts
    )
    if card.memory_bytes != held:
        raise StoreError(
            f"{folder / CARD_FILE}: memory_bytes is {card.memory_bytes}, but the "
            f"store takes {held}"
        )
    check_files(folder, card.files, {layer_file(number) for number in card.layers})
    return TokenStore(folder, card)


def check_layer(layer: TokenLayer, num_experts: int) -> None:
    """Refuse numbers that are no keys or no assignments.

    Raises:
        StoreError: says which.
    """
    lengths = np.linalg.norm(layer.keys.astype(np.float32), axis=1)
    if not (np.abs(lengths - 1) <= LENGTH_ERROR).all():
        raise StoreError("a key is not finite or not of length 1")
    if not ((layer.ids >= 0) & (layer.ids < num_experts)).all():
        raise StoreError(f"an expert is none of 0..{num_experts - 1}")
    ordered = np.sort(layer.ids, axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise StoreError("an assignment names an expert twice")
    sums = layer.weights.astype(np.float64).sum(axis=1)
    if not ((layer.weights >= 0).all() and (sums > 0).all()):
        raise StoreError("an assignment holds a weight that is negative or no number")
    if not (sums <= 1 + SUM_ERROR).all():
        raise StoreError("an assignment's weights sum to more than 1")
