# SPDX-License-Identifier: Apache-2.0
"""Building a token store from labelled questions, through the adapter."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from moe_tta import __version__
from moe_tta.adapter.assignments import (
    Assigned,
    LabelledText,
    TokenDescent,
    assign_tokens,
)
from moe_tta.remix.card import (
    DescentCard,
    Precision,
    Scored,
    TokenCard,
    TokenCounts,
)
from moe_tta.remix.embed import unit
from moe_tta.remix.errors import StoreError
from moe_tta.remix.folder import describe_files, write_card
from moe_tta.remix.questions import read_questions
from moe_tta.remix.reference_model import ReferenceModel
from moe_tta.remix.shards import sha256, write_tensors
from moe_tta.remix.tokens import TokenStore, layer_file, load_tokens, memory_bytes

BATCH_TOKENS = 1024  # of one batch, padding included


@dataclass(frozen=True)
class TokenOptions:
    """How a token store is built.

    Attributes:
        scored: The tokens to make likelier, of which a row each is stored: the
            label's, or those of the whole text but its first.
        descent: How assignments are sought.
        max_tokens: The build ends with so many; later questions are not read.
        precision: Of the stored keys.
    """

    scored: Scored = "label"
    descent: TokenDescent = field(default_factory=TokenDescent)
    max_tokens: int = 4096
    precision: Precision = "float32"


def build_tokens(
    model: ReferenceModel,
    data: Path,
    out: Path,
    options: TokenOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> TokenStore:
    """Build a token store. A build that is stopped begins anew.

    Memory: all stored keys once in float32, and of a batch of texts the input of every
    layer and the activations of one.

    Args:
        model: The model.
        data: File of questions with their answers.
        out: The store's folder, made here.
        options: How to build it.
        progress: Called with the number of questions read so far.

    Raises:
        StoreError: `out` exists, a question is malformed, or none gave a token.
    """
    if out.exists():
        raise StoreError(f"{out}: exists already")
    found = _Collected(options.max_tokens)
    for batch in _batches(model, data, options, found):
        assigned = assign_tokens(model.adapter, batch, options.descent)
        found.add(batch, assigned, options.descent.steps > 0)
        progress(found.questions)
    if not found.tokens:
        raise StoreError(f"{data}: none of {found.questions} questions gave a token")
    return _write(model, data, out, options, found)


def _batches(
    model: ReferenceModel, data: Path, options: TokenOptions, found: _Collected
) -> Iterator[list[LabelledText]]:
    """Yield texts that are read at once, until enough tokens were found."""
    batch: list[LabelledText] = []
    longest = 0
    for question in read_questions(data):
        text = model.text(question, options.scored)
        found.questions += 1
        found.too_long += text is None
        if text is None:
            continue
        longest = max(longest, len(text.tokens))
        if batch and (len(batch) + 1) * longest > BATCH_TOKENS:
            yield batch
            if found.full:
                return
            batch, longest = [], len(text.tokens)
        batch.append(text)
    if batch:
        yield batch


class _Collected:
    """Rows of all texts so far, without those whose whole prefix came before."""

    def __init__(self, max_tokens: int):
        self._max = max_tokens
        self._seen: set[bytes] = set()
        self._parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self.losses: list[np.ndarray] = []  # [R, 2] each
        self.questions = self.too_long = self.unimproved = self.repeated = 0
        self.tokens = 0

    @property
    def full(self) -> bool:
        return self.tokens >= self._max

    def add(
        self, texts: Sequence[LabelledText], assigned: Assigned, tried: bool
    ) -> None:
        rows = self._new_rows(texts, assigned)
        self._parts.append(
            (
                assigned.keys[:, rows].float().cpu().numpy(),
                assigned.ids[:, rows].cpu().numpy(),
                assigned.weights[:, rows].float().cpu().numpy(),
            )
        )
        self.losses.append(assigned.losses.float().cpu().numpy())
        self.unimproved += int((~assigned.improved).sum()) if tried else 0
        self.tokens += len(rows)

    def _new_rows(self, texts: Sequence[LabelledText], assigned: Assigned) -> list[int]:
        rows = []
        places = zip(assigned.owners.tolist(), assigned.positions.tolist(), strict=True)
        for row, (owner, position) in enumerate(places):
            if self.tokens + len(rows) == self._max:
                break
            # causal: equal tokens up to here are equal router inputs in every layer
            prefix = np.asarray(texts[owner].tokens[: position + 1], np.int64)
            mark = hashlib.sha256(prefix.tobytes()).digest()
            if mark in self._seen:
                self.repeated += 1
                continue
            self._seen.add(mark)
            rows.append(row)
        return rows

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """Return one layer's keys [N, H], ids and weights [N, K]."""
        keys, ids, weights = (
            np.concatenate([part[kind][index] for part in self._parts])
            for kind in range(3)
        )
        return {"keys": unit(keys)[0], "ids": ids, "weights": weights}


def _write(
    model: ReferenceModel,
    data: Path,
    out: Path,
    options: TokenOptions,
    found: _Collected,
) -> TokenStore:
    ready = out.with_name(out.name + ".assembling")
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir(parents=True)
    for index, number in enumerate(model.card.moe_layers):
        tensors = found.layer(index)
        tensors["keys"] = tensors["keys"].astype(options.precision)
        write_tensors(ready / layer_file(number), tensors)
    write_card(ready, _card(model, data, options, found, ready))
    os.replace(ready, out)
    return load_tokens(out)


def _card(
    model: ReferenceModel,
    data: Path,
    options: TokenOptions,
    found: _Collected,
    folder: Path,
) -> TokenCard:
    before, after = np.concatenate(found.losses).mean(axis=0, dtype=np.float64)
    layers, hidden_size = model.card.moe_layers, model.adapter.config.hidden_size
    return TokenCard(
        model=model.card,
        layers=layers,
        hidden_size=hidden_size,
        precision=options.precision,
        data_sha256=sha256(data),
        descent=DescentCard(
            scored=options.scored,
            steps=options.descent.steps,
            lr=options.descent.lr,
            clip=options.descent.clip,
            before=float(before),
            after=float(after),
        ),
        counts=TokenCounts(
            questions=found.questions,
            too_long=found.too_long,
            unimproved=found.unimproved,
            repeated=found.repeated,
            tokens=found.tokens,
        ),
        memory_bytes=memory_bytes(
            len(layers), found.tokens, hidden_size, model.card.num_experts
        ),
        created_by=f"moe-tta {__version__}",
        files=describe_files(folder),
    )
