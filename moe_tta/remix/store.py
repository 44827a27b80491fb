# SPDX-License-Identifier: Apache-2.0
"""A reference store: a folder of pathways, embeddings, an index and a card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from moe_tta.remix.card import CARD_FILE, ModelCard, StoreCard
from moe_tta.remix.errors import StoreError
from moe_tta.remix.folder import check_files, check_model, read_card
from moe_tta.remix.index import read_index
from moe_tta.remix.questions import Question
from moe_tta.remix.shards import Shard

INDEX_FILE = "index.faiss"
TEXTS_FILE = "references.jsonl"
BLOCK_ROWS = 1024
SUM_ERROR = 1e-3  # of a distribution stored in float16, and what plans accept


def shard_file(number: int) -> str:
    """Return a shard's file name."""
    return f"references-{number:05d}.safetensors"


@dataclass(frozen=True, eq=False)
class Store:
    """An open store; build one with `load_store`. N references, threads may share it.

    Shards hold `pathways` [n, L, E] (distributions of `card.layers`), `embeddings`
    [n, D] float32 of length 1 and `norms` [n], their lengths before.
    """

    path: Path
    card: StoreCard
    index: Any
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        return self.card.counts.kept

    def check(self, model: ModelCard) -> None:
        """Refuse a model other than the one whose pathways these are.

        Raises:
            StoreError: names every difference.
        """
        check_model(self.path, self.card.model, model)

    def pathways(self, rows: np.ndarray, layers: list[int]) -> np.ndarray:
        """Read references' pathways.

        Args:
            rows: [K] places in the store.
            layers: Decoder layers, of those the store holds.

        Returns:
            [K, len(layers), E] float32.

        Raises:
            StoreError: a file was damaged since it was opened, or a layer is not held.
        """
        places = self._places(layers)
        return self._gather("pathways", rows)[:, places].astype(np.float32)

    def blocks(self, layers: list[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield all references in order: rows [n] and pathways [n, len(layers), E].

        Raises:
            StoreError: as `pathways`.
        """
        places, first = self._places(layers), 0
        for shard, count in zip(self.shards, self.card.shard_rows, strict=True):
            for start in range(0, count, BLOCK_ROWS):
                size = min(BLOCK_ROWS, count - start)
                block = shard.rows("pathways", start, size)[:, places]
                rows = np.arange(first + start, first + start + size)
                yield rows, block.astype(np.float32)
            first += count

    def _places(self, layers: list[int]) -> list[int]:
        missing = sorted(set(layers) - set(self.card.layers))
        if missing:
            raise StoreError(f"{self.path}: holds no layer {missing[0]}")
        return [self.card.layers.index(layer) for layer in layers]

    def norms(self, rows: np.ndarray) -> np.ndarray:
        """Return the lengths [K] of references' embeddings before scaling to 1."""
        return self._gather("norms", rows)

    def embeddings(self, rows: np.ndarray) -> np.ndarray:
        """Return references' unit embeddings [K, D] float32."""
        return self._gather("embeddings", rows)

    def _gather(self, name: str, rows: np.ndarray) -> np.ndarray:
        ends = np.cumsum(self.card.shard_rows)
        numbers = np.searchsorted(ends, rows, side="right")
        firsts = ends - self.card.shard_rows
        return np.concatenate(
            [
                self.shards[number].rows(name, int(row - firsts[number]), 1)
                for number, row in zip(numbers.tolist(), rows, strict=True)
            ]
        )

    def question(self, row: int) -> Question:
        """Read one reference's question, with its answers.

        Raises:
            StoreError: the file was damaged since it was opened.
        """
        first, end = self._lines[row : row + 2]
        with (self.path / TEXTS_FILE).open("rb") as file:
            file.seek(first)
            try:
                return Question.model_validate_json(file.read(end - first))
            except ValidationError as err:
                raise StoreError(
                    f"{self.path / TEXTS_FILE}: line {row}: {err}"
                ) from err

    @cached_property
    def _lines(self) -> list[int]:
        """Byte offsets of the lines, and the end of the last one."""
        with (self.path / TEXTS_FILE).open("rb") as file:
            return [0, *accumulate(map(len, file))]


def load_store(path: str | Path) -> Store:
    """Open a store after checking every file's size and hash against the card.

    Raises:
        StoreError: a file is missing, damaged, or not of the card's shape.
    """
    folder = Path(path)
    card = read_card(folder)
    if not isinstance(card, StoreCard):
        raise StoreError(f"{folder}: holds single tokens, not questions")
    if sum(card.shard_rows) != card.counts.kept:
        raise StoreError(
            f"{folder / CARD_FILE}: shard_rows do not add up to {card.counts.kept}"
        )
    names = {shard_file(number) for number in range(len(card.shard_rows))}
    check_files(folder, card.files, {INDEX_FILE, TEXTS_FILE, *names})
    shards = tuple(Shard(folder / shard_file(i)) for i in range(len(card.shard_rows)))
    for shard, rows in zip(shards, card.shard_rows, strict=True):
        _check_shard(shard, rows, card)
    index = read_index(folder / INDEX_FILE, card.counts.kept, card.embedder.dim)
    return Store(folder, card, index, shards)


def _check_shard(shard: Shard, rows: int, card: StoreCard) -> None:
    want = {
        "pathways": ((rows, len(card.layers), card.model.num_experts), card.precision),
        "embeddings": ((rows, card.embedder.dim), "float32"),
        "norms": ((rows,), "float32"),
    }
    for name, (shape, dtype) in want.items():
        got = shard.shape(name), str(shard.dtype(name))
        if got != (shape, dtype):
            raise StoreError(
                f"{shard.path}: {name} is {got[1]} {got[0]}, expected {dtype} {shape}"
            )


def check_pathways(pathways: np.ndarray) -> None:
    """Refuse what is no distribution over experts in the last axis.

    Raises:
        StoreError: a value is negative or not finite, or a sum is not 1.
    """
    sums = pathways.astype(np.float64).sum(axis=-1)
    if not (np.isfinite(pathways).all() and (pathways >= 0).all()):
        raise StoreError("a pathway holds values that are negative or not finite")
    if (np.abs(sums - 1) > SUM_ERROR).any():
        raise StoreError("a pathway's probabilities do not sum to 1")
