# SPDX-License-Identifier: Apache-2.0
"""What a look-up of knn costs on a GPU, in a captured graph, a layer at a time.

`python -m benchmarks.remix.recall_gpu --out FILE.json` appends one run to the file.

For each number of tokens in the memory and of rows in the step: `all` rows ask for
`--k` neighbours, or `none` does, which is what an engine pays for a store that nobody
names. A graph holds one layer's two launches `--layers` times, each layer with keys of
its own, so that no cache holds them all; times are of one of them, medians of
`--repeats` measurements. `read_us` is half of copying the keys within the device's
memory, about what reading them takes. `plain_torch_us` is `kernels.recall`,
the law, for the same rows. No time is printed unless both give the same bits.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.kernel.timing import median_us
from benchmarks.overhead.record import ResultFile, conditions
from moe_tta.kernels.packed_memory import StoredTokens, pack
from moe_tta.kernels.recall import LayerMemory, recall_rows
from moe_tta.kernels.recall_triton import RecallKernel, RecallWorkspace
from moe_tta.kernels.table import LayerTable, PlanTable
from moe_tta.plan import RoutingPlan
from moe_tta.shape import RouterShape

ROWS = (1, 8, 64)
TOKENS = (10_000, 100_000)


class Step(NamedTuple):
    """What the kernels are given."""

    hidden: torch.Tensor  # [T, H]
    slots: torch.Tensor  # [T] int32
    asking: torch.Tensor  # [1 + T] int32


def stored(tokens: int, args: argparse.Namespace) -> StoredTokens:
    """Draw keys and assignments: what a look-up costs does not depend on them."""
    generator = torch.Generator(args.device).manual_seed(tokens)
    options = {"generator": generator, "device": args.device}
    keys = torch.randn(tokens, args.hidden_size, **options)
    keys /= keys.norm(dim=1, keepdim=True)
    return StoredTokens(keys, torch.rand(tokens, args.experts, **options))


def one_plan(args: argparse.Namespace) -> LayerTable:
    """Return the table of a layer whose slot 1 asks for `args.k` neighbours."""
    numbers = {"layers": (0,), "num_hidden_layers": 1, "top_k": 1, "k_max": 1}
    shape = RouterShape(num_experts=args.experts, **numbers)
    table = PlanTable(shape, 1, args.device)
    table.write({1: RoutingPlan(memory=np.int32([1]), neighbours=np.int32([args.k]))})
    return table.layer(0)


def step(rows: int, asking: bool, args: argparse.Namespace) -> Step:
    """Draw rows that all ask, or of which none does."""
    generator = torch.Generator(args.device).manual_seed(rows)
    hidden = torch.randn(
        rows, args.hidden_size, generator=generator, device=args.device
    )
    count = rows if asking else 0
    numbers = torch.tensor([count, *range(rows)], dtype=torch.int32)
    slots = torch.full((rows,), int(asking), dtype=torch.int32)
    return Step(hidden.bfloat16(), slots.to(args.device), numbers.to(args.device))


def check(
    kernel: RecallKernel, given: Step, table: LayerTable, law: LayerMemory
) -> None:
    """Raise `SystemExit` unless kernels and law give the same bits."""
    found, want = kernel(*given), recall_rows(*given[:2], table, [law])
    asks = given.slots > 0
    for got, right in zip(found, want, strict=True):
        if not torch.equal(got[asks], right[asks]):
            raise SystemExit("kernels and law differ: no time is printed")


def measure(tokens: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one size of memory."""
    table = one_plan(args)
    space = RecallWorkspace(max(ROWS), args.experts, args.device)
    first = stored(tokens, args)
    packed = [pack([first], args.device)]
    packed += [
        packed[0]._replace(keys=packed[0].keys.clone()) for _ in range(args.layers - 1)
    ]
    kernels = [RecallKernel(table, memory, space) for memory in packed]
    wide = first.keys.double()
    law = LayerMemory(wide / wide.norm(dim=1, keepdim=True), first.values)
    found = []
    for rows in ROWS:
        every, nobody = (step(rows, asking, args) for asking in (True, False))
        check(kernels[0], every, table, law)

        row = {"tokens": tokens, "rows": rows, "key_bytes": packed[0].keys.nbytes}
        for name, given in (("all", every), ("none", nobody)):
            launches = [partial(kernel, *given) for kernel in kernels]
            row[f"{name}_us"] = median_us(launches, args.repeats)
        plain = partial(recall_rows, *every[:2], table, [law])
        row["plain_torch_us"] = median_us([plain], args.repeats)
        copy = partial(packed[1].keys.copy_, packed[0].keys)
        row["read_us"] = median_us([copy], args.repeats) / 2  # it reads and writes
        found.append(row)
    return found


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options.add_argument("--hidden-size", type=int, default=2048)
    options.add_argument("--experts", type=int, default=64)
    options.add_argument("--k", type=int, default=8)
    options.add_argument("--layers", type=int, default=4)
    options.add_argument("--repeats", type=int, default=30)
    options.add_argument("--device", default="cuda")
    options.add_argument("--out", type=Path)
    return options


def main() -> None:
    options = parser()
    args = options.parse_args()
    if args.layers < 2:
        options.error("--layers must be at least 2: keys are copied between two")
    if not torch.cuda.is_available():
        options.error("needs a CUDA device: PyTorch finds none here")
    rows = [row for tokens in args.tokens for row in measure(tokens, args)]
    print(json.dumps(rows, indent=2))
    if args.out is not None:
        run = {"conditions": conditions(vars(args)), "rows": rows}
        ResultFile(args.out).write(run)


if __name__ == "__main__":
    main()
