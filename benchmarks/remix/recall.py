# SPDX-License-Identifier: Apache-2.0
"""What knn costs on CPU: its look-up alone, and an engine with and without it.

`python -m benchmarks.remix.recall MODEL --out FILE.json` appends one run to the file.

The store is synthetic, `--tokens` random keys and assignments in every layer: what a
look-up costs does not depend on the numbers. `look_up_ms` is `kernels.recall` for one
layer and that many rows. An engine's `seconds` is a batch of `--requests` prompts of
`--prompt` tokens, `--generated` tokens each, prefix cache off; the least and the median
of `--repeats`. `stock` has the plugin and no store, `idle` a store that no request
names, `knn` requests that all do. No ratio is printed unless `stock` and `idle` gave
the same tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from benchmarks.overhead.record import ResultFile, conditions
from benchmarks.remix.engine import greedy, serving
from moe_tta import __version__
from moe_tta.adapter.families import router_shape
from moe_tta.kernels.recall import LayerMemory, recall
from moe_tta.remix.card import DescentCard, ModelCard, TokenCard, TokenCounts
from moe_tta.remix.checkpoint import weights_hash
from moe_tta.remix.folder import describe_files, write_card
from moe_tta.remix.shards import write_tensors
from moe_tta.remix.tokens import layer_file, memory_bytes

ROWS = (1, 8, 64, 512)


def look_up(
    tokens: int, hidden_size: int, experts: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Time one layer's look-up by rows, in milliseconds."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(tokens, hidden_size, generator=generator, dtype=torch.float64)
    memory = LayerMemory(
        keys / keys.norm(dim=1, keepdim=True),
        torch.rand(tokens, experts, generator=generator),
    )
    found = {}
    for rows in ROWS:
        hidden = torch.randn(rows, hidden_size, generator=generator)
        counts, taken = torch.full((rows,), 8), []
        for _ in range(repeats):
            start = perf_counter()
            recall(hidden, counts, memory)
            taken.append(1e3 * (perf_counter() - start))
        found[str(rows)] = summary(taken)
    return found


def summary(taken: list[float]) -> dict[str, float]:
    return {
        "min": round(min(taken), 4),
        "median": round(statistics.median(taken), 4),
    }


def write_store(model: Path, config: Any, dtype: str, tokens: int, out: Path) -> None:
    """Write random keys and assignments that fit the model."""
    rng, shape = np.random.default_rng(0), router_shape(config)
    card = ModelCard.of(shape, name="", weights=weights_hash(model), dtype=dtype)
    out.mkdir()
    for number in shape.layers:
        keys = rng.standard_normal((tokens, config.hidden_size)).astype(np.float32)
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
        order = rng.random((tokens, shape.num_experts)).argsort(axis=1)
        weights = rng.dirichlet(np.ones(shape.top_k), tokens).astype(np.float32)
        ids = order[:, : shape.top_k]
        write_tensors(
            out / layer_file(number), {"keys": keys, "ids": ids, "weights": weights}
        )
    layers, size = list(shape.layers), config.hidden_size
    counts = TokenCounts(
        questions=1, too_long=0, unimproved=0, repeated=0, tokens=tokens
    )
    write_card(
        out,
        TokenCard(
            model=card,
            layers=layers,
            hidden_size=size,
            precision="float32",
            data_sha256="",
            descent=DescentCard(
                scored="text", steps=0, lr=0, clip=0, before=0, after=0
            ),
            counts=counts,
            memory_bytes=memory_bytes(len(layers), tokens, size, shape.num_experts),
            created_by=f"moe-tta {__version__}",
            files=describe_files(out),
        ),
    )


@contextmanager
def engine(args: argparse.Namespace, stores: dict[str, str]):
    """Yield a way to generate one batch: (request) -> (seconds, tokens)."""
    rng = random.Random(0)
    prompts = [
        {"prompt_token_ids": [rng.randrange(2, 200) for _ in range(args.prompt)]}
        for _ in range(args.requests)
    ]

    with serving(args, stores) as llm:

        def run(request: dict | None) -> tuple[float, list[list[int]]]:
            start = perf_counter()
            done = llm.generate(prompts, greedy(args, request), use_tqdm=False)
            taken = perf_counter() - start
            return taken, [list(output.outputs[0].token_ids) for output in done]

        yield run


def measure(args: argparse.Namespace, config: Any, folder: Path) -> dict[str, Any]:
    write_store(args.model, config, args.dtype, args.tokens, folder / "store")
    taken: dict[str, list[float]] = {"stock": [], "idle": [], "knn": []}
    tokens = {}
    asked = {"knn": {"store": "random"}}
    with engine(args, {}) as run:
        run(None)
        for _ in range(args.repeats):
            seconds, tokens["stock"] = run(None)
            taken["stock"].append(seconds)
    with engine(args, {"random": str(folder / "store")}) as run:
        run(asked)
        for _ in range(args.repeats):
            for name, request in (("idle", None), ("knn", asked)):
                seconds, tokens[name] = run(request)
                taken[name].append(seconds)
    if tokens["stock"] != tokens["idle"]:
        raise SystemExit("stock and idle gave different tokens: no ratio is printed")
    least = {name: min(values) for name, values in taken.items()}
    return {
        "seconds": {name: summary(values) for name, values in taken.items()},
        "ratio": {n: round(least[n] / least["stock"], 3) for n in ("idle", "knn")},
    }


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", type=Path)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--tokens", type=int, default=4096)
    options.add_argument("--requests", type=int, default=8)
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--generated", type=int, default=32)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--out", type=Path)
    return options


def main() -> None:
    from transformers import AutoConfig

    options = parser()
    args = options.parse_args()
    if not (args.model / "config.json").is_file():
        options.error(
            f"{args.model} holds no config.json: expected a checkpoint folder"
        )
    config = AutoConfig.from_pretrained(args.model)
    shape = router_shape(config)
    size = (args.tokens, config.hidden_size, shape.num_experts)
    with tempfile.TemporaryDirectory() as folder:
        row = {
            "layers": len(shape.layers),
            "hidden_size": config.hidden_size,
            "threads": torch.get_num_threads(),
            "look_up_ms": look_up(*size, repeats=20 * args.repeats),
            **measure(args, config, Path(folder)),
        }
    print(json.dumps(row, indent=2))
    if args.out is not None:
        run = {"conditions": conditions(vars(args)), "rows": [row]}
        ResultFile(args.out).write(run)


if __name__ == "__main__":
    main()
