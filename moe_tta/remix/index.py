# SPDX-License-Identifier: Apache-2.0
"""The faiss index over a store's unit embeddings, by inner product."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moe_tta.remix.errors import StoreError

EXACT_ROWS = 4096  # up to here every row is compared; 1 ms at 384 dimensions
LIST_FACTOR = 4  # lists: LIST_FACTOR * sqrt(rows), as faiss advises
TRAIN_ROWS, MIN_TRAIN_ROWS = 64, 40  # per list
NUM_PROBES = 32  # lists searched for a query
SEED = 1234


def faiss() -> Any:
    """Return the faiss module.

    Raises:
        StoreError: it is not installed.
    """
    try:
        import faiss as module
    except ImportError as err:
        raise StoreError("faiss is missing: pip install 'moe-tta[remix]'") from err
    return module


def build_index(embeddings: np.ndarray) -> Any:
    """Index unit embeddings [N, D] float32.

    Up to `EXACT_ROWS` rows are searched one by one. More are put into lists by
    nearest centroid, of which a search visits `NUM_PROBES`: a near neighbour in
    another list is missed, which near ones hardly ever are.
    """
    module = faiss()
    rows, dim = embeddings.shape
    flat = module.IndexFlatIP(dim)
    if rows <= EXACT_ROWS:
        flat.add(embeddings)
        return flat
    num_lists = min(int(LIST_FACTOR * rows**0.5), rows // MIN_TRAIN_ROWS)
    index = module.IndexIVFFlat(flat, dim, num_lists, module.METRIC_INNER_PRODUCT)
    index.cp.seed = SEED
    picked = np.random.default_rng(SEED).permutation(rows)[: TRAIN_ROWS * num_lists]
    index.train(np.ascontiguousarray(embeddings[np.sort(picked)]))
    index.add(embeddings)
    index.nprobe = min(NUM_PROBES, num_lists)
    return index


def write_index(index: Any, path: Path) -> None:
    """Write the index in faiss's own format, which holds no code."""
    faiss().write_index(index, str(path))


def read_index(path: Path, rows: int, dim: int) -> Any:
    """Read an index whose hash was checked; faiss may crash on a damaged one.

    Raises:
        StoreError: it is none, or not of these rows and dimensions.
    """
    try:
        index = faiss().read_index(str(path))
    except RuntimeError as err:
        raise StoreError(f"{path}: faiss cannot read it: {err}") from err
    if (index.ntotal, index.d) != (rows, dim):
        raise StoreError(
            f"{path}: indexes {index.ntotal} rows of {index.d} dimensions, the card "
            f"says {rows} of {dim}"
        )
    return index


def without_duplicates(blocks: Iterable[np.ndarray], at_least: float) -> Iterator[bool]:
    """Say of each unit embedding whether to keep it.

    One is dropped whose cosine similarity to an earlier kept one is `at_least` or
    more. Exact: every kept one is compared.

    Args:
        blocks: Embeddings in order, in arrays [n, D] float32.
        at_least: Similarity; more than 1 keeps all.
    """
    kept = None
    for block in blocks:
        kept = kept or faiss().IndexFlatIP(block.shape[1])
        nearest = np.full(len(block), -np.inf)
        if kept.ntotal:
            nearest = kept.search(block, 1)[0][:, 0]
        within = block @ block.T
        keep = nearest < at_least
        for row in range(len(block)):
            if keep[row]:
                keep[row] = not (within[row, :row][keep[:row]] >= at_least).any()
        kept.add(np.ascontiguousarray(block[keep]))
        yield from keep.tolist()
