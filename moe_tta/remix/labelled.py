# SPDX-License-Identifier: Apache-2.0
"""References as labelled token ids, for updates that lower their loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from moe_tta.remix.errors import StoreError
from moe_tta.remix.store import Store
from moe_tta.remix.updates import Borrowed


class Labelled(NamedTuple):
    """A neighbour: its question, its right answer, and how much it counts."""

    prompt: list[int]  # token ids
    answer: list[int]  # token ids that follow
    weight: float

    @property
    def tokens(self) -> int:
        """Length of question and answer."""
        return len(self.prompt) + len(self.answer)


def read_labelled(
    store: Store, found: Borrowed, encode: Callable[[str], Sequence[int]]
) -> list[Labelled]:
    """Return neighbours' questions and answers as the builder gave them to the model.

    Args:
        store: The references.
        found: The neighbours.
        encode: The model's tokenizer, as prompts are encoded.

    Raises:
        StoreError: the store was damaged, or an answer is no token.
    """
    weights = (found.weights / found.weights.sum()).tolist()
    labelled = []
    for row, weight in zip(found.rows.tolist(), weights, strict=True):
        question = store.question(row)
        prompt = list(encode(question.prompt))
        whole = list(encode(f"{question.prompt} {question.label}"))
        if not prompt or len(whole) <= len(prompt):
            raise StoreError(f"{store.path}: reference {row} has an answer of no token")
        labelled.append(Labelled(prompt, whole[len(prompt) :], weight))
    return labelled


def to_arguments(labelled: Sequence[Labelled]) -> list[dict[str, Any]]:
    """Return plain types that msgpack can carry to the engine."""
    return [one._asdict() for one in labelled]
