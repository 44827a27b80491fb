# SPDX-License-Identifier: Apache-2.0
"""What online rerouting costs: batches that reroute, and their plain neighbours.

`python -m benchmarks.reroute.cost --model olmoe --batch 1,8,32` runs whole requests,
prompts of 150 to 200 tokens and 256 new ones, in one engine. All modes run in short
rounds in an order drawn anew; a ratio is taken within a round. Rounds for warmth come
first and are kept apart, as `warm`.

plain, plain-again: nobody reroutes.
wait, overlap: everybody does; `ratio` is that of the batch's time to `plain`.
alone: half of the batch, plain, by itself.
beside-wait, beside-overlap: that half and another one that reroutes; the gaps between
    tokens of the plain half against those of `alone`: the 50th and 99th percentile of
    a round's gaps, and the longest.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.overhead.engines import EngineOptions
from benchmarks.overhead.models import DTYPE_BYTES, Model
from benchmarks.overhead.ratios import interval
from benchmarks.overhead.record import ResultFile, conditions
from benchmarks.overhead.rounds import Cell, Deadline
from benchmarks.reroute.engine import LENGTHS, Asked, RerouteEngine, draw_prompts

PLAIN, ALONE = "plain", "alone"
WHOLE = (PLAIN, "plain-again", "wait", "overlap")
HALVES = (ALONE, "beside-wait", "beside-overlap")
WARM_TOKENS = 8
PERCENTILES = {"p50": 50, "p99": 99, "longest": 100}


def modes_of(size: int) -> tuple[str, ...]:
    """Return the modes measured at a batch size: one request has no half."""
    return WHOLE if size == 1 else WHOLE + HALVES


def ask(
    prompts: Sequence[list[int]], mode: str, settings: dict[str, Any]
) -> list[Asked]:
    """Return the requests of a mode; those in even places are plain beside others."""
    asked = []
    for place, prompt in enumerate(prompts):
        kind, beside = mode.removeprefix("beside-"), mode in HALVES
        if mode == ALONE and place % 2:
            continue
        plain = kind not in ("wait", "overlap") or (beside and place % 2 == 0)
        request = None if plain else {"reroute": {**settings, "mode": kind}}
        asked.append(Asked(prompt, request))
    return asked


def measure(
    engine: RerouteEngine, size: int, mode: str, number: int, args: argparse.Namespace
) -> dict[str, Any]:
    """Run one batch; return its sample. Rounds up to number 0 are for warmth."""
    vocab_size = engine.config.model_config.get_vocab_size()
    settings = {"every": args.every, "steps": args.steps}
    asked = ask(draw_prompts(size, number, vocab_size), mode, settings)
    plain = all(one.request is None for one in asked)
    played = engine.play(asked, WARM_TOKENS if plain and number < 1 else args.tokens)
    sample = {
        **{"batch": size, "mode": mode, "round": number},
        **{"seconds": played.seconds, "peak_bytes": played.peak_bytes},
        "outcomes": dict(Counter(r["outcome"] for r in played.rounds)),
        "adapter_seconds": sum(r["milliseconds"] for r in played.rounds) / 1e3,
    }
    if mode in HALVES:
        rows = zip(asked, played.gaps, strict=True)
        plain = np.concatenate([gaps for one, gaps in rows if one.request is None])
        for name, share in PERCENTILES.items():
            sample[name] = float(np.percentile(plain, share))
    return sample


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each batch size, mode and measure.

    Returns:
        `seconds` (median), `ratio` (median over rounds of the ratio to `plain`, for
        gaps to `alone`, in the same round), `low` and `high` (bootstrap, 95 %),
        `fastest` and `slowest` ratio, and `rounds`.
    """
    rows = []
    for size in sorted({s["batch"] for s in samples}):
        for mode in modes_of(size):
            base = ALONE if mode in HALVES else PLAIN
            for measure_ in PERCENTILES if mode in HALVES else ("seconds",):
                times = {
                    (s["mode"], s["round"]): s[measure_]
                    for s in samples
                    if s["batch"] == size and s["mode"] in (mode, base)
                }
                row = {"batch": size, "mode": mode, "measure": measure_}
                rows.append(row | _compare(times, mode, base))
    return rows


def _compare(times: dict[tuple[str, int], float], mode: str, base: str) -> dict:
    found = {number: t for (name, number), t in times.items() if name == mode}
    ratios = [t / times[base, number] for number, t in found.items()]
    low, high = interval(ratios)
    return {
        **{"seconds": float(np.median(list(found.values()))), "rounds": len(ratios)},
        **{"ratio": float(np.median(ratios)), "low": low, "high": high},
        **{"fastest": min(ratios), "slowest": max(ratios)},
    }


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the summary as text."""
    for row in rows:
        yield (
            f"{row['batch']:4} {row['mode']:15} {row['measure']:8}"
            f"{row['seconds'] * 1e3:11.3f} ms  x {row['ratio']:.3f}"
            f"  [{row['low']:.3f}, {row['high']:.3f}]"
            f"  {row['fastest']:.3f} to {row['slowest']:.3f}  {row['rounds']} rounds"
        )


def engine_spec(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """Return the engine's options; graphs for every batch and its half."""
    sizes = {max(1, part) for size in args.batch for part in (size, size // 2)}
    cells = [Cell("decode", size, LENGTHS[1], args.tokens) for size in sorted(sizes)]
    spec = EngineOptions(model, cells, args.dtype, args.eager).spec("plugin", 1)
    spec["options"]["additional_config"]["moe_tta"]["adapter"] = {
        "budget": args.adapter_budget,
        "batch_tokens": args.batch_tokens,
        "last_loss": not args.no_last_loss,
    }
    return {**spec, "begin": time.time()}


def run(args: argparse.Namespace, begin: float) -> dict[str, Any]:
    """Measure until the budget is spent; write the file after each round."""
    model = Model.find(args.model)
    engine = RerouteEngine(engine_spec(args, model))
    found: dict[str, Any] = {
        "benchmark": "reroute-cost",
        "conditions": conditions(vars(args), model),
        "engine": engine.facts,
        "warm": [],
        "samples": [],
    }
    file = ResultFile(args.out)
    cells = [(size, mode) for size in args.batch for mode in modes_of(size)]
    for number in range(1 - args.warm, 1):
        for size, mode in cells:
            found["warm"].append(measure(engine, size, mode, number, args))
    print(f"warm after {time.perf_counter() - begin:.1f} s", flush=True)
    deadline = Deadline(begin + args.budget)
    for number in range(1, args.repeat + 1):
        start = time.perf_counter()
        for size, mode in random.Random(number).sample(cells, len(cells)):
            found["samples"].append(measure(engine, size, mode, number, args))
        found["summary"] = summarise(found["samples"])
        file.write(found)
        took = time.perf_counter() - start
        print(f"round {number}: {took:.1f} s", flush=True)
        deadline.longest = max(deadline.longest, took)
        if not deadline.allows_another():
            break
    return found


def sizes(text: str) -> tuple[int, ...]:
    """Read a list of batch sizes."""
    return tuple(int(size) for size in text.split(","))


def make_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser("benchmarks.reroute.cost", description=__doc__)
    parser.add_argument("--model", default="olmoe", help="as of benchmarks.overhead")
    parser.add_argument("--batch", type=sizes, default=(1, 8, 32))
    parser.add_argument("--tokens", type=int, default=256, help="new ones a request")
    parser.add_argument("--every", type=int, default=128, help="m, tokens")
    parser.add_argument("--steps", type=int, default=5, help="n, of a round")
    parser.add_argument(
        "--adapter-budget", type=int, default=2048, help="the engine's adapter.budget"
    )
    parser.add_argument(
        "--batch-tokens", type=int, default=0, help="its adapter.batch_tokens"
    )
    parser.add_argument(
        "--no-last-loss", action="store_true", help="its adapter.last_loss is false"
    )
    parser.add_argument(
        "--warm",
        type=int,
        default=2,
        help="rounds before, of other prompts: the adapter captures its passes",
    )
    parser.add_argument("--repeat", type=int, default=10, help="rounds at most")
    parser.add_argument(
        "--budget", type=float, default=200, help="seconds; later no round starts"
    )
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="no graphs, no compile")
    parser.add_argument("--out", type=Path, help="results/reroute-cost-MODEL.json")
    return parser


def main() -> int:
    """Measure, print the summary, say where the file is."""
    begin = time.perf_counter()
    parser = make_parser()
    args = parser.parse_args()
    name = f"reroute-cost-{Path(args.model).name}.json"
    args.out = args.out or Path("benchmarks/results") / name
    # the engine runs in this process, step by step
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        found = run(args, begin)
    except ValueError as err:
        parser.error(str(err))
    print("\n".join(lines(found["summary"])))
    outcomes = sum((Counter(s["outcomes"]) for s in found["samples"]), Counter())
    print(f"rounds by outcome: {dict(outcomes)}")
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
