# SPDX-License-Identifier: Apache-2.0
"""Time of the routing kernel on one GPU, against its floor and vLLM's own op.

`python -m benchmarks.kernel --grid full --out FILE.json` appends one run to the file.
`python -m benchmarks.kernel --check-stock` compares rows of slot 0 with vLLM's op bit
for bit and exits with 1 if any differs. vLLM's op comes from an installed vLLM, or
from MOE_C=FILE.so without importing vLLM.

Times are medians of CUDA graphs that launch the same kernel over many logits buffers,
each with outputs of its own. A case is cold when these buffers are more than twice
the L2 cache; the others run from L2, as after a router's own matrix product.
"""

from __future__ import annotations

import argparse
import platform
import sys
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import triton

from benchmarks.kernel import grid, stock
from benchmarks.kernel.floor import launch_copy, launch_empty
from benchmarks.kernel.report import append_run, judge, mismatch_lines, speed_lines
from benchmarks.kernel.timing import median_us
from benchmarks.kernel.variants import Model

WORD = 4  # bytes


def measure(case: grid.Case, model: Model, op: stock.Stock | None) -> dict:
    """Time all variants of one case and their floors."""
    logits_bytes = case.tokens * case.experts * grid.LOGIT_BYTES
    count = 64 if case.tokens <= 4096 else 16
    size = case.tokens, case.experts
    logits = [
        torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(count)
    ]
    variants = model.variants(case, logits, op)
    times = {name: median_us(v.launches) for name, v in variants.items()}
    launch = median_us([partial(launch_empty, logits[0])] * count)
    copies: dict[int, float] = {}
    for variant in variants.values():
        if variant.read_bytes not in copies:
            copies[variant.read_bytes] = copy_us(case, variant.read_bytes, count)
    written = grid.must_write(case)
    judged = {
        name: judge(
            times[name],
            variant.read_bytes + written,
            copies[variant.read_bytes],
            launch,
            times.get("stock"),
        )
        for name, variant in variants.items()
    }
    total = count * (logits_bytes + written)
    cold = total > 2 * torch.cuda.get_device_properties(0).L2_cache_size
    return {**case._asdict(), "buffers": count, "cold": cold, "variants": judged}


def copy_us(case: grid.Case, read_bytes: int, count: int) -> float:
    """Time a plain kernel that reads and writes as many bytes as the case must."""

    def words(num_bytes: int) -> torch.Tensor:
        return torch.zeros(-(-num_bytes // WORD), dtype=torch.int32, device="cuda")

    return median_us(
        [
            partial(launch_copy, words(grid.must_write(case)), words(read_bytes))
            for _ in range(count)
        ]
    )


def run(name: str, experts: list[int], op: stock.Stock | None) -> dict:
    """Measure a grid's models of so many experts; return conditions and rows."""
    rows, models = [], {}
    for case in grid.cases(name):
        if case.experts not in experts:
            continue
        size = case.experts, case.top_k
        if size not in models:
            models = {size: Model(*size)}  # one table at a time
        rows.append(measure(case, models[size], op))
        print("\n".join(speed_lines(rows[-1:])[bool(rows[1:]) :]), flush=True)
    conditions = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "stock": "none" if op is None else stock.origin(),
        "python": platform.python_version(),
        "logits": "bfloat16",
        "grid": name,
    }
    return {"conditions": conditions, "rows": rows}


def check_stock(name: str, op: stock.Stock | None) -> int:
    """Print how many rows of slot 0 differ from stock; return the exit status."""
    if op is None:
        print("vLLM's _moe_C is missing: install vLLM for CUDA or set MOE_C=FILE.so")
        return 2
    findings = []
    for model in stock.MODELS:
        findings += stock.compare(op, model, grid.TOKENS[name])
    print("rows that differ from stock, ids / weights", flush=True)
    print("\n".join(mismatch_lines(findings)))
    wrong = [found for found in findings if found.ids or found.weights]
    for found in wrong[:20]:
        print(found)
    print(f"{len(wrong)} of {len(findings)} launches differ")
    return int(bool(wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grid", choices=grid.TOKENS, default="small")
    every = [experts for experts, _ in grid.MODELS]
    parser.add_argument(
        "--experts",
        type=int,
        nargs="+",
        choices=every,
        default=every,
        help="only the grid's models of so many experts",
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--check-stock", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a CUDA device")
    op = stock.find_stock()
    if args.check_stock:
        return check_stock(args.grid, op)
    found = run(args.grid, args.experts, op)
    print(*(f"{key} {value}" for key, value in found["conditions"].items()), sep=", ")
    if args.out is not None:
        append_run(args.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
