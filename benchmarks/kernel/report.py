# SPDX-License-Identifier: Apache-2.0
"""The benchmark's numbers: ratios, JSON and tables."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path


def judge(
    us: float, num_bytes: int, copy_us: float, launch_us: float, stock_us: float | None
) -> dict[str, float | None]:
    """Set one median beside its floor and stock's median.

    The floor is the longer of an empty launch and a plain move of `num_bytes`.
    """
    floor = max(copy_us, launch_us)
    return {
        "us": us,
        "bytes": num_bytes,
        "bytes_per_s": num_bytes / (us * 1e-6),
        "launch_us": launch_us,
        "copy_us": copy_us,
        "over_floor": us / floor,
        "over_stock": None if stock_us is None else us / stock_us,
    }


def append_run(path: Path, run: dict) -> None:
    """Add a run to the JSON list in the file, which need not exist."""
    runs = json.loads(path.read_text()) if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([*runs, run], indent=1) + "\n")


def speed_lines(rows: Iterable[dict]) -> list[str]:
    """Return a table of measured rows: one line per case and variant."""
    head = ("T", "E", "k", "rows", "us", "launch us", "copy us", "GB/s")
    cells = [(*head, "/floor", "/stock", "cold")]
    for row in rows:
        for name, found in row["variants"].items():
            stock = found["over_stock"]
            cells.append(
                (
                    *(str(row[key]) for key in ("tokens", "experts", "top_k")),
                    name,
                    *(f"{found[key]:.2f}" for key in ("us", "launch_us", "copy_us")),
                    f"{found['bytes_per_s'] / 1e9:.1f}",
                    f"{found['over_floor']:.2f}",
                    "-" if stock is None else f"{stock:.2f}",
                    "yes" if row["cold"] else "no",
                )
            )
    return _align(cells)


def mismatch_lines(findings: Sequence) -> list[str]:
    """Return a table of `Finding` sums over T: differing rows in ids / weights."""
    kinds = list(dict.fromkeys(found.kind for found in findings))
    sums: dict[tuple, dict[str, list[int]]] = {}
    for found in findings:
        key = found.experts, found.top_k, found.dtype, found.renormalize
        cell = sums.setdefault(key, {kind: [0, 0, 0] for kind in kinds})[found.kind]
        for index, number in enumerate((found.ids, found.weights, found.tokens)):
            cell[index] += number
    cells = [("E", "k", "logits", "renorm", *kinds)]
    for key, by_kind in sums.items():
        counts = (f"{i}/{w} of {rows}" for i, w, rows in by_kind.values())
        cells.append((*map(str, key), *counts))
    return _align(cells)


def _align(cells: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True))
        for line in cells
    ]
