# SPDX-License-Identifier: Apache-2.0
"""What requests with remix cost while they decode, beside a large store.

`python -m benchmarks.remix.decode MODEL --out FILE.json` appends one run to the file.

One engine serves a synthetic store of `--rows` references. A round is a batch of
`--requests` prompts for each mode, in an order drawn anew: `plain`, `plain-again`, and
`remix`, where every request brings a vector of its own. Its neighbours get next to no
share, so that texts stay those of `plain`: other texts use other experts, and on a CPU
that alone takes other times. Timed is the median step after the prompts were read, when
no row has a plan any more; a ratio is taken within a round, and its median is shown
with a 95 % bootstrap interval. `same_texts` counts batches whose tokens are `plain`'s.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.overhead.ratios import interval
from benchmarks.overhead.record import ResultFile, conditions
from benchmarks.remix.engine import greedy, serving
from benchmarks.remix.lookup import SyntheticEngine, make_store
from moe_tta.adapter.families import router_shape
from moe_tta.remix.card import ModelCard
from moe_tta.remix.checkpoint import weights_hash

PLAIN = "plain"
MODES = (PLAIN, "plain-again", "remix")
ALPHA = 1 - 1e-6  # share that a token's own distribution keeps


def decode_step(
    core: Any, args: argparse.Namespace, vectors: list | None
) -> tuple[float, list[list[int]]]:
    """Run a batch; return the median of its decode steps in seconds, and its tokens."""
    rng = random.Random(args.prompt)
    for number in range(args.requests):
        asked = None
        if vectors:
            asked = {"store": "solved", "vector": vectors[number], "floor": -1}
            asked["alpha"] = ALPHA
        params = greedy(args, asked and {"remix": asked})
        prompt = [rng.randrange(2, 200) for _ in range(args.prompt)]
        core.add_request(str(number), {"prompt_token_ids": prompt}, params)
    taken, done = [], {}
    while core.has_unfinished_requests():
        start = perf_counter()
        outputs = core.step()
        taken.append(perf_counter() - start)
        done |= {o.request_id: list(o.outputs[0].token_ids) for o in outputs}
    # the first ones read the prompts, the last clears up
    return statistics.median(taken[2:-1]), [done[name] for name in sorted(done)]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all rounds; return raw seconds a step and ratios by mode."""
    from transformers import AutoConfig

    shape = router_shape(AutoConfig.from_pretrained(args.model))
    card = ModelCard.of(
        shape, name="", weights=weights_hash(args.model), dtype=args.dtype
    )
    made = SyntheticEngine(args.rows, card)
    make_store(made, args.rows, folder)
    taken: dict[str, list[float]] = {mode: [] for mode in MODES}
    same = dict.fromkeys(MODES, 0)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # step by step
    with serving(args, {"solved": str(folder / "store")}) as llm:
        core = llm.llm_engine
        _, texts = decode_step(core, args, None)
        for number in range(args.rounds + 1):
            for mode in random.Random(number).sample(MODES, len(MODES)):
                given = made.states(args.requests).tolist() if mode == "remix" else None
                seconds, tokens = decode_step(core, args, given)
                if number:  # the first warms up
                    taken[mode].append(seconds)
                    same[mode] += tokens == texts
    ratios = {}
    for mode, values in taken.items():
        pairs = [s / base for s, base in zip(values, taken[PLAIN], strict=True)]
        low, high = interval(pairs)
        median = statistics.median(pairs)
        ratios[mode] = {"median": median, "low": low, "high": high}
        ratios[mode]["same_texts"] = same[mode]
    return {"layers": len(shape.layers), "ratios": ratios, "step_s": taken}


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("model", type=Path)
    options.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    options.add_argument("--rows", type=int, default=100_000)
    options.add_argument("--requests", type=int, default=8)
    options.add_argument("--prompt", type=int, default=32)
    options.add_argument("--generated", type=int, default=24)
    options.add_argument("--rounds", type=int, default=12)
    options.add_argument("--out", type=Path)
    return options


def main() -> None:
    options = parser()
    args = options.parse_args()
    if not (args.model / "config.json").is_file():
        options.error(
            f"{args.model} holds no config.json: expected a checkpoint folder"
        )
    with tempfile.TemporaryDirectory() as folder:
        row = measure(args, Path(folder))
    print(json.dumps(row["ratios"], indent=2))
    if args.out is not None:
        run = {"conditions": conditions(vars(args)), "rows": [row]}
        ResultFile(args.out).write(run)


if __name__ == "__main__":
    main()
