# SPDX-License-Identifier: Apache-2.0
"""The model a token store is built for: its gradients, its card, its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer

from moe_tta.adapter.assignments import LabelledText
from moe_tta.adapter.errors import AdapterError
from moe_tta.adapter.model import AdapterModel
from moe_tta.remix.card import ModelCard, Scored
from moe_tta.remix.checkpoint import find_checkpoint, weights_hash
from moe_tta.remix.errors import StoreError
from moe_tta.remix.questions import Question


@dataclass(frozen=True)
class ReferenceModel:
    """The model whose routers a store is for."""

    adapter: AdapterModel
    card: ModelCard
    encode: Callable[[str], list[int]]  # as the server tokenises prompts

    @staticmethod
    def open(model: str, dtype: str) -> ReferenceModel:
        """Open a checkpoint with its tokenizer.

        Args:
            model: Folder, or name in the Hugging Face cache.
            dtype: That the server computes in, `bfloat16` or `float32`.

        Raises:
            StoreError: it cannot be found, or gradients cannot be taken through it.
        """
        folder = find_checkpoint(model)
        try:
            adapter = AdapterModel.from_checkpoint(folder, getattr(torch, dtype))
        except AdapterError as err:
            raise StoreError(str(err)) from err
        card = ModelCard.of(
            adapter.shape,
            name=model.rstrip("/").rsplit("/", 1)[-1],
            weights=weights_hash(folder),
            dtype=dtype,
        )
        return ReferenceModel(
            adapter, card, AutoTokenizer.from_pretrained(folder).encode
        )

    def text(self, question: Question, scored: Scored) -> LabelledText | None:
        """Return a question with its answer; `None` if it is too long for the model."""
        tokens = self.encode(f"{question.prompt} {question.label}")
        first = len(self.encode(question.prompt)) if scored == "label" else 1
        if 1 <= first < len(tokens) <= self.adapter.config.max_position_embeddings:
            return LabelledText(tokens, first)
        return None
