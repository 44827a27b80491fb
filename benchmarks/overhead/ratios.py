# SPDX-License-Identifier: Apache-2.0
"""From samples to ratios: each round against stock in the same round."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.overhead.modes import AGAIN, ENGINE_OF, STOCK

RESAMPLES = 2000
UNPLANNED = (AGAIN, "idle", "k-max")  # no request carries a plan: tokens are stock's

Sample = Mapping[str, Any]


def summarise(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """Return a row for each measure, size and mode.

    Args:
        samples: Each with `group`, `round`, `mode`, `measure`, `size` and `seconds`.

    Returns:
        Rows with `seconds` (median), `ratio` (median over rounds of the ratio to stock
        in the same round), `low` and `high` (bootstrap, 95 %) and `rounds`, those
        compared. Without any, where stock's time was 0 or is missing, the three are
        `None`.
    """
    cells: dict[tuple, dict[str, dict[tuple, float]]] = defaultdict(dict)
    for sample in samples:
        modes = cells[sample["measure"], sample["size"]]
        rounds = modes.setdefault(sample["mode"], {})
        rounds[sample["group"], sample["round"]] = sample["seconds"]
    return [
        {"measure": measure, "size": size, "mode": mode, **_compare(modes[mode], modes)}
        for (measure, size), modes in sorted(cells.items(), key=_by_size)
        for mode in ENGINE_OF
        if mode in modes
    ]


def _by_size(item: tuple[tuple[str, str], Any]) -> tuple:
    (measure, size), _ = item
    return measure, [int(number) for number in size.split("x")]


def _compare(
    found: Mapping[tuple, float], modes: Mapping[str, Mapping[tuple, float]]
) -> dict[str, Any]:
    stock = modes.get(STOCK, {})
    ratios = [found[key] / stock[key] for key in found if stock.get(key)]
    low, high = interval(ratios) if ratios else (None, None)
    return {
        "seconds": float(np.median(list(found.values()))),
        "ratio": float(np.median(ratios)) if ratios else None,
        "low": low,
        "high": high,
        "rounds": len(ratios),
    }


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the median, the same in every call."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(np.asarray(values), (RESAMPLES, len(values)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def agreement(samples: Iterable[Sample]) -> dict[str, tuple[int, int]]:
    """Count batches whose tokens equal stock's: mode to (equal, compared)."""
    batches: dict[tuple, dict[str, str]] = defaultdict(dict)
    for sample in samples:
        if "digest" in sample:
            key = tuple(sample[name] for name in ("group", "round", "measure", "size"))
            batches[key][sample["mode"]] = sample["digest"]
    counts = {}
    for mode in UNPLANNED:
        both = [b for b in batches.values() if mode in b and STOCK in b]
        if both:
            counts[mode] = (sum(b[mode] == b[STOCK] for b in both), len(both))
    return counts


def lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the summary as text, a block for each measure and size."""
    text, cell = [], None
    for row in rows:
        if (row["measure"], row["size"]) != cell:
            cell = row["measure"], row["size"]
            text.append(f"{row['measure']} {row['size']}")
        seconds = f"  {row['mode']:13} {row['seconds'] * 1e3:10.4f} ms"
        if row["rounds"]:
            spread = f"[{row['low']:.4f}, {row['high']:.4f}]"
            seconds += f"  x {row['ratio']:.4f}  {spread}  {row['rounds']} rounds"
        text.append(seconds)
    return text
