# SPDX-License-Identifier: Apache-2.0
"""Time of one look-up in a large store, in the API process.

`python -m benchmarks.remix.lookup --out FILE.json` appends one run to the file.

The store is synthetic: `--rows` unit vectors in clusters (a centre plus noise, as
questions gather by topic) and random pathways of OLMoE's 16 layers and 64 experts. A
sample is everything that a request with a vector costs at admission: parsing, the
look-up, reading the neighbours' pathways, regression and compiling the plan. `search`
is faiss alone, and `recall` the share of the true nearest neighbours it finds. Text
embedding is timed apart, on prompts never seen before.
On a machine with other work, read the least time, not the median.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from time import perf_counter, perf_counter_ns
from typing import Any

import numpy as np

from benchmarks.overhead.record import ResultFile, conditions
from moe_tta.deferred import compile_or_defer
from moe_tta.remix.assemble import build_store
from moe_tta.remix.build import BuildOptions, Recorded
from moe_tta.remix.card import ModelCard
from moe_tta.remix.embed import TextEmbedder, unit
from moe_tta.remix.serving import ServedStore
from moe_tta.shape import RouterShape
from moe_tta.spec import parse
from moe_tta.strategies import PlanContext, Prompt

SHAPE = RouterShape(
    layers=tuple(range(16)), num_hidden_layers=16, num_experts=64, top_k=8, k_max=8
)
DIM = 384  # of all-MiniLM-L6-v2
NEIGHBOURS = 3
PER_CLUSTER = 50
NOISE = 0.7  # of a vector against its centre, per dimension


class SyntheticEngine:
    """Answers every question, with random pathways and clustered states.

    Args:
        rows: How many questions it will be asked.
        model: Whose routing it pretends to record; one of `SHAPE` by default.
        seed: Of everything random.
    """

    score = "raw"

    def __init__(self, rows: int, model: ModelCard | None = None, seed: int = 0):
        self.model = model or ModelCard.of(
            SHAPE, name="synthetic", weights="", dtype="float32"
        )
        self._rng = np.random.default_rng(seed)
        self._centres = self._rng.standard_normal((rows // PER_CLUSTER, DIM))

    def states(self, count: int) -> np.ndarray:
        chosen = self._rng.integers(0, len(self._centres), count)
        noise = NOISE * self._rng.standard_normal((count, DIM))
        return (self._centres[chosen] + noise).astype(np.float32)

    def judge(self, questions: list) -> list[str]:
        return ["right"] * len(questions)

    def record(self, questions: list) -> Recorded:
        layers = len(self.model.moe_layers)
        size = (len(questions), layers, self.model.num_experts)
        drawn = self._rng.random(size, np.float32) ** 4
        states = self.states(len(questions))
        pathways = drawn / drawn.sum(axis=-1, keepdims=True)
        return Recorded(pathways, states, states)


def make_store(engine: SyntheticEngine, rows: int, folder: Path) -> ServedStore:
    data = folder / "questions.jsonl"
    line = '{{"prompt": "question {}", "answers": ["a"]}}\n'
    data.write_text("".join(line.format(i) for i in range(rows)), "utf-8")
    options = BuildOptions(
        embedder="hidden_last", duplicates_from=2.0, part_questions=4096
    )
    return ServedStore(build_store(engine, data, folder / "store", options), None)


def times(call: Callable[[Any], Any], values: Iterable[Any]) -> dict[str, float]:
    """Time calls; returns least, median and 99th percentile in milliseconds."""
    taken = []
    for value in values:
        start = perf_counter_ns()
        call(value)
        taken.append((perf_counter_ns() - start) / 1e6)
    return {
        "min_ms": round(min(taken), 3),
        "median_ms": round(statistics.median(taken), 3),
        "p99_ms": round(float(np.quantile(taken, 0.99)), 3),
    }


def recall(served: ServedStore, queries: np.ndarray) -> float:
    """Return the share of the nearest `NEIGHBOURS` that the index finds."""
    store = served.store
    vectors = np.concatenate(
        [
            shard.rows("embeddings", 0, rows)
            for shard, rows in zip(store.shards, store.card.shard_rows, strict=True)
        ]
    )
    true = np.argsort(-(queries @ vectors.T), axis=1)[:, :NEIGHBOURS]
    found = store.index.search(queries, NEIGHBOURS)[1]
    hits = [
        len({*a.tolist()} & {*b.tolist()}) for a, b in zip(true, found, strict=True)
    ]
    return sum(hits) / true.size


def measure(rows: int, samples: int) -> dict[str, Any]:
    import faiss

    engine = SyntheticEngine(rows)
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        served = make_store(engine, rows, Path(folder))
        built = perf_counter() - start
        context = PlanContext(SHAPE, stores={"solved": served})
        queries, _ = unit(engine.states(samples))

        def admit(vector: list[float]) -> None:
            text = {"remix": {"store": "solved", "vector": vector, "floor": -1.0}}
            asked = compile_or_defer(parse(json.dumps(text), presets={}), context)
            assert not asked.compile(context, Prompt([1], str)).neutral

        embedder = TextEmbedder()
        texts = (f"Question: what are {i} and {i + 1}?\nAnswer:" for i in range(50))
        return {
            "rows": rows,
            "faiss_threads": faiss.omp_get_max_threads(),
            "probes": getattr(served.store.index, "nprobe", None),
            "search": times(lambda q: served.store.index.search(q[None], 3), queries),
            "request": times(admit, queries.tolist()),
            "recall": round(recall(served, queries[:200]), 4),
            "embed_text": times(embedder.embed, texts),
            "build_s": round(built, 1),
        }


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--samples", type=int, default=1000)
    options.add_argument("--out", type=Path)
    return options


def main() -> None:
    args = parser().parse_args()
    row = measure(args.rows, args.samples)
    print(json.dumps(row, indent=2))
    if args.out is not None:
        run = {"conditions": conditions(vars(args)), "rows": [row]}
        ResultFile(args.out).write(run)


if __name__ == "__main__":
    main()
