# SPDX-License-Identifier: Apache-2.0
"""A store and its embedder, as requests use them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_tta.remix.card import ModelCard
from moe_tta.remix.embed import TextEmbedder, open_embedder, unit
from moe_tta.remix.store import Store, load_store


@dataclass(frozen=True, eq=False)
class ServedStore:
    """A store that was checked against the served model.

    Attributes:
        store: The references.
        embedder: Makes queries of texts; `None` where the store was built with hidden
            states, and a request must bring its vector.
    """

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
