# SPDX-License-Identifier: Apache-2.0
"""Time of the combining kernels against their floor, in CUDA graphs.

The floor is the longer of an empty launch and a plain kernel that moves the bytes of a
combination: two rows of logits read and one float32 row written per pair. Cold cases
go over more buffers than twice the L2 cache holds; warm ones over one buffer again and
again, as right after the product that wrote the logits. Where a GPU can overlap the two
launches, each case is timed both ways against one floor.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import partial
from itertools import product
from pathlib import Path

import torch
import triton

from benchmarks.kernel.floor import launch_copy, launch_empty
from benchmarks.kernel.report import append_run, judge
from benchmarks.kernel.timing import median_us
from moe_tta.kernels.contrast_triton import ContrastRows, can_overlap

WORD = 4  # bytes
LAUNCHES = (4, 64)  # in a graph, at least and at most
# source of the logits -> whether the result overwrites them
SOURCES = {torch.float32: True, torch.bfloat16: False}


def must_read(vocab: int, pairs: int, dtype: torch.dtype) -> int:
    """Return the bytes of both rows of each pair."""
    return 2 * pairs * vocab * dtype.itemsize


def must_write(vocab: int, pairs: int) -> int:
    """Return the bytes of one float32 row per pair."""
    return pairs * vocab * WORD


def measure(vocab: int, pairs: int, dtype: torch.dtype, cold: bool) -> list[dict]:
    """Time one case and its floors; one row for each way to launch."""
    read, written = must_read(vocab, pairs, dtype), must_write(vocab, pairs)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    low, high = LAUNCHES
    count = min(high, max(low, -(-5 * cache // (2 * (read + written)))))
    buffers = count if cold else 1
    copies = [copy(read, written) for _ in range(buffers)]
    copy_us = median_us(copies * (count // buffers))
    launch_us = median_us([partial(launch_empty, torch.zeros(1, device="cuda"))] * high)
    name = str(dtype).removeprefix("torch.")
    case = {
        **{"vocab": vocab, "pairs": pairs, "logits": name, "cold": cold},
        **{"buffers": buffers, "launches": count},
    }
    rows = []
    for overlap in ways():
        combine = ContrastRows(pairs, vocab, "cuda", overlap)
        launches = [combination(combine, vocab, pairs, dtype) for _ in range(buffers)]
        us = median_us(launches * (count // buffers))
        found = judge(us, read + written, copy_us, launch_us, None)
        rows.append({**case, "overlap": overlap, **found})
    return rows


def ways() -> tuple[bool, ...]:
    """Return whether the launches overlap, for each way that this GPU has."""
    return (False, True) if can_overlap(torch.device("cuda")) else (False,)


def combination(
    combine: ContrastRows, vocab: int, pairs: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Return a launch on logits of its own; a pair's rows lie side by side."""
    rows = 2 * pairs
    logits = torch.randn(rows, vocab, device="cuda", dtype=torch.float32).to(dtype)
    in_place = SOURCES[dtype]
    out = logits if in_place else torch.empty(rows, vocab, device="cuda")
    leads = torch.arange(0, rows, 2, device="cuda")
    beta = torch.full((pairs,), 0.5, device="cuda")
    alpha = torch.full((pairs,), 0.1, device="cuda")
    given = logits, out, leads, leads + 1, beta, alpha
    combine.check(*given)
    return partial(combine, *given)


def copy(read: int, written: int) -> Callable[[], None]:
    """Return a launch that reads and writes as many bytes."""
    source, target = (
        torch.zeros(size // WORD, dtype=torch.int32, device="cuda")
        for size in (read, written)
    )
    return partial(launch_copy, target, source)


def lines(rows: Sequence[dict]) -> list[str]:
    """Return the table as text."""
    text = [
        " vocab pairs   logits  cold overlap       us"
        "     copy   launch     GB/s  /floor"
    ]
    for row in rows:
        text.append(
            f"{row['vocab']:6} {row['pairs']:5} {row['logits']:>8} "
            f"{'yes' if row['cold'] else 'no':>5} "
            f"{'yes' if row['overlap'] else 'no':>7} {row['us']:8.2f} "
            f"{row['copy_us']:8.2f} {row['launch_us']:8.2f} "
            f"{row['bytes_per_s'] / 1e9:8.0f} {row['over_floor']:7.3f}"
        )
    return text


def main(vocabs: Sequence[int], pairs: Sequence[int], out: Path) -> int:
    """Measure the grid; append the run to the file."""
    if not torch.cuda.is_available():
        print("needs a CUDA device", file=sys.stderr)
        return 2
    grid = product(vocabs, pairs, SOURCES, (True, False))
    rows = [row for case in grid for row in measure(*case)]
    conditions = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    print("\n".join(lines(rows)))
    append_run(out, {"conditions": conditions, "rows": rows})
    return 0
