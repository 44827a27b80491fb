# SPDX-License-Identifier: Apache-2.0
"""Time of a decode step: contrast requests against as many plain ones.

All modes run in the same engine, in short rounds and in an order drawn anew; a ratio
is taken within a round. `plain-twice` is what twice as many plain requests cost: what
`contrast` takes beyond it is the weak plan, the combination and the scheduling.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from benchmarks.overhead.engine import Engine
from benchmarks.overhead.engines import EngineOptions
from benchmarks.overhead.models import DTYPE_BYTES, Model
from benchmarks.overhead.ratios import interval
from benchmarks.overhead.record import ResultFile, conditions
from benchmarks.overhead.rounds import WARM_STEPS, Cell, Deadline

__all__ = ["DTYPE_BYTES", "MODES", "PairEngine", "main", "summarise"]

PLAIN, AGAIN, TWICE, CONTRAST = "plain", "plain-again", "plain-twice", "contrast"
MODES = (PLAIN, AGAIN, TWICE, CONTRAST)


class PairEngine(Engine):
    """An engine whose orders name a mode in `MODES` and a number of pairs.

    Args:
        spec: As of `Engine`.
        rank: Of the weak stream's only expert.
    """

    def __init__(self, spec: dict[str, Any], rank: int):
        super().__init__(spec)
        self.request = {"contrast": {"weak": {"rank": rank}}}

    def requests(self, order: dict[str, Any]) -> list[dict[str, Any] | None]:
        """Return what each request carries under `moe_tta`."""
        request = self.request if order["mode"] == CONTRAST else None
        return [request] * order["size"]

    def step_seconds(self, cell: Cell, mode: str, number: int) -> float:
        """Return the time of one decode step."""
        size = cell.size * (2 if mode == TWICE else 1)
        order = {
            **{"what": "decode", "size": size, "prompt": cell.prompt, "mode": mode},
            **{"steps": cell.steps, "round": number},
        }
        return self.measure(order)["seconds"]["decode"]


def summarise(samples: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each number of pairs and mode.

    Returns:
        `seconds` (median), `ratio` (median over rounds of the ratio to plain in the
        same round), `low` and `high` (bootstrap, 95 %), `fastest` and `slowest` ratio,
        and `rounds`.
    """
    times = {(s["pairs"], s["mode"], s["round"]): s["seconds"] for s in samples}
    rows = []
    for pairs in sorted({s["pairs"] for s in samples}):
        for mode in MODES:
            found = {key[2]: t for key, t in times.items() if key[:2] == (pairs, mode)}
            ratios = [t / times[pairs, PLAIN, number] for number, t in found.items()]
            low, high = interval(ratios)
            rows.append(
                {
                    **{"pairs": pairs, "mode": mode, "rounds": len(ratios)},
                    **{"seconds": float(np.median(list(found.values())))},
                    **{"ratio": float(np.median(ratios)), "low": low, "high": high},
                    **{"fastest": min(ratios), "slowest": max(ratios)},
                }
            )
    return rows


def lines(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the summary as text."""
    for row in rows:
        yield (
            f"{row['pairs']:4} {row['mode']:12} {row['seconds'] * 1e3:9.4f} ms"
            f"  x {row['ratio']:.4f}  [{row['low']:.4f}, {row['high']:.4f}]"
            f"  {row['rounds']} rounds"
        )


def main(args: argparse.Namespace) -> int:
    """Measure until the budget is spent; write the file after each round."""
    begin = time.perf_counter()
    model = Model.find(args.model)
    cells = [Cell("decode", pairs, args.prompt, args.steps) for pairs in args.pairs]
    # twice as many sequences: sizes the engine, and the graphs of either batch
    doubled = [Cell("decode", 2 * c.size, c.prompt, c.steps) for c in cells]
    options = EngineOptions(model, [*cells, *doubled], args.dtype, args.eager)
    spec = {**options.spec("plugin", 1), "begin": time.time()}
    engine = PairEngine(spec, args.rank)
    run = {
        "benchmark": "contrast",
        "conditions": conditions(vars(args), model),
        "engine": engine.facts,
        "samples": [],
    }
    file = ResultFile(args.out)
    for cell in cells:
        warm = Cell("decode", cell.size, cell.prompt, WARM_STEPS)
        for mode in MODES:
            engine.step_seconds(warm, mode, 0)
    print(f"warm after {time.perf_counter() - begin:.1f} s", flush=True)
    deadline = Deadline(begin + args.budget)
    for number in range(1, args.repeat + 1):
        start = time.perf_counter()
        run["samples"] += measure_round(engine, cells, number)
        run["summary"] = summarise(run["samples"])
        file.write(run)
        deadline.longest = max(deadline.longest, time.perf_counter() - start)
        if not deadline.allows_another():
            break
    print("\n".join(lines(run["summary"])))
    print(f"wrote {args.out}")
    return 0


def measure_round(
    engine: PairEngine, cells: Sequence[Cell], number: int
) -> list[dict[str, Any]]:
    """Return a sample of every cell and mode, in an order drawn by the number."""
    rng = random.Random(number)
    return [
        {
            **{"round": number, "pairs": cell.size, "mode": mode},
            "seconds": engine.step_seconds(cell, mode, number),
        }
        for cell in rng.sample(cells, len(cells))
        for mode in rng.sample(MODES, len(MODES))
    ]
