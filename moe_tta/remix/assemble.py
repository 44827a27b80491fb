# SPDX-License-Identifier: Apache-2.0
"""Assembling a store from recorded parts: no duplicates, shards, index, card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from moe_tta import __version__
from moe_tta.remix.build import (
    BuildOptions,
    Engine,
    part_file,
    record_parts,
    work_folder,
)
from moe_tta.remix.card import Counts, EmbedderCard, StoreCard
from moe_tta.remix.errors import StoreError
from moe_tta.remix.folder import describe_files, write_card
from moe_tta.remix.index import build_index, without_duplicates, write_index
from moe_tta.remix.questions import read_questions
from moe_tta.remix.shards import sha256, write_tensors
from moe_tta.remix.store import (
    INDEX_FILE,
    TEXTS_FILE,
    Store,
    load_store,
    shard_file,
)

SHARD_ROWS = 8192
BLOCK_ROWS = 1024  # compared at once for duplicates

Parts = list[dict[str, np.ndarray]]


def build_store(
    engine: Engine,
    data: Path,
    out: Path,
    options: BuildOptions,
    progress: Callable[[int], None] = lambda done: None,
) -> Store:
    """Build a store, or go on with an unfinished one.

    Memory: one part of questions, and all embeddings twice at the end; pathways go
    from file to file.

    Args:
        engine: The model whose pathways are recorded.
        data: File of questions.
        out: The store's folder, made here.
        options: How to build it.
        progress: Called with the number of questions done.

    Raises:
        StoreError: `out` exists, an unfinished build was started otherwise, a question
            is malformed, or no question was answered rightly.
    """
    if out.exists():
        raise StoreError(f"{out}: exists already")
    embedder = record_parts(engine, data, out, options, progress)
    done = work_folder(out)
    ready = out.with_name(out.name + ".assembling")
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir(parents=True)
    _assemble(engine, data, done, ready, embedder, options)
    os.replace(ready, out)
    shutil.rmtree(done)
    return load_store(out)


def _assemble(
    engine: Engine,
    data: Path,
    done: Path,
    ready: Path,
    embedder: EmbedderCard,
    options: BuildOptions,
) -> None:
    questions, too_long, wrong = sum(part["counts"] for part in _parts(done)).tolist()
    keep = np.array(
        list(without_duplicates(_blocks(done), options.duplicates_from)), bool
    )
    if not keep.any():
        raise StoreError(f"{data}: none of {questions} questions was answered rightly")
    shard_rows, kept_rows, embeddings = _write_shards(done, ready, keep)
    write_index(build_index(embeddings), ready / INDEX_FILE)
    _write_texts(data, ready / TEXTS_FILE, kept_rows)
    layers = engine.model.moe_layers if options.layers is None else options.layers
    card = StoreCard(
        model=engine.model,
        layers=sorted(set(layers)),
        precision=options.precision,
        embedder=embedder,
        data_sha256=sha256(data),
        score=engine.score,
        duplicates_from=options.duplicates_from,
        counts=Counts(
            questions=questions,
            too_long=too_long,
            wrong=wrong,
            duplicates=int((~keep).sum()),
            kept=int(keep.sum()),
        ),
        shard_rows=shard_rows,
        created_by=f"moe-tta {__version__}",
        files=describe_files(ready),
    )
    write_card(ready, card)


def _parts(done: Path) -> Iterator[dict[str, np.ndarray]]:
    number = 0
    while (path := done / part_file(number)).exists():
        yield load_file(path)
        number += 1


def _blocks(done: Path) -> Iterator[np.ndarray]:
    for part in _parts(done):
        embeddings = part["embeddings"]
        for first in range(0, len(embeddings), BLOCK_ROWS):
            yield embeddings[first : first + BLOCK_ROWS]


def _write_shards(
    done: Path, ready: Path, keep: np.ndarray
) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Write the kept rows; returns rows by shard, question numbers, embeddings."""
    shard_rows: list[int] = []
    pending: Parts = []
    rows, embeddings = [], []

    def flush() -> None:
        names = ("pathways", "embeddings", "norms")
        tensors = {n: np.concatenate([part[n] for part in pending]) for n in names}
        write_tensors(ready / shard_file(len(shard_rows)), tensors)
        shard_rows.append(len(tensors["norms"]))
        pending.clear()

    flags = iter(keep.tolist())
    for part in _parts(done):
        chosen = np.array(list(islice(flags, len(part["rows"]))), bool)
        if not chosen.any():
            continue
        kept = {name: part[name][chosen] for name in part if name != "counts"}
        rows.append(kept.pop("rows"))
        embeddings.append(kept["embeddings"])
        pending.append(kept)
        if sum(len(item["norms"]) for item in pending) >= SHARD_ROWS:
            flush()
    if pending:
        flush()
    return shard_rows, np.concatenate(rows), np.concatenate(embeddings)


def _write_texts(data: Path, path: Path, kept_rows: np.ndarray) -> None:
    """Copy the kept questions, one a line."""
    kept = set(kept_rows.tolist())
    with path.open("w", encoding="utf-8") as file:
        for number, question in enumerate(read_questions(data)):
            if number in kept:
                file.write(question.model_dump_json(exclude_defaults=True) + "\n")
