# SPDX-License-Identifier: Apache-2.0
"""Stores as requests use them, checked against the served model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from moe_tta.remix.card import ModelCard, TokenCard
from moe_tta.remix.embed import TextEmbedder, open_embedder, unit
from moe_tta.remix.errors import StoreError
from moe_tta.remix.folder import read_card
from moe_tta.remix.store import Store, load_store
from moe_tta.remix.tokens import TokenStore, open_tokens


@dataclass(frozen=True, eq=False)
class ServedStore:
    """A store of questions and its embedder.

    Attributes:
        store: The references.
        embedder: Makes queries of texts; `None` where the store was built with hidden
            states, and a request must bring its vector.
    """

    HOLDS: ClassVar[str] = "questions"
    FOR: ClassVar[str] = "remix"

    store: Store
    embedder: TextEmbedder | None

    @staticmethod
    def open(path: str, model: ModelCard) -> ServedStore:
        """Open a store and its embedder.

        Raises:
            StoreError: either is missing, damaged or made for something else.
        """
        store = load_store(path)
        store.check(model)
        return ServedStore(store, open_embedder(store.card.embedder))

    def query(self, text: str) -> np.ndarray:
        """Return a text's unit embedding [D] float32."""
        return unit(self.embedder.embed(text))[0]


@dataclass(frozen=True)
class ServedTokens:
    """A token store, whose numbers are in the worker.

    Attributes:
        card: Of the store.
        place: Names it in plans: its place among all stores of the settings, from 1.
    """

    HOLDS: ClassVar[str] = "tokens"
    FOR: ClassVar[str] = "knn"

    card: TokenCard
    place: int


def holds_tokens(path: str) -> bool:
    """Return whether a folder says that it is a token store.

    Raises:
        StoreError: it has no readable card.
    """
    return isinstance(read_card(Path(path)), TokenCard)


def open_served_tokens(path: str, model: ModelCard, max_mib: int) -> TokenStore:
    """Open a token store for a model; the API process and the worker judge it alike.

    Args:
        path: Its folder.
        model: The served one.
        max_mib: Most memory it may take.

    Raises:
        StoreError: a file of it is missing or damaged, it was made for something else,
            or it takes more memory.
    """
    store = open_tokens(path)
    store.check(model)
    if store.card.memory_bytes > max_mib << 20:
        raise StoreError(
            f"{path}: takes {store.card.memory_bytes / 2**20:.0f} MiB of memory, more "
            f"than max_store_mib, {max_mib}"
        )
    return store
