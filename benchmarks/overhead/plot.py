# SPDX-License-Identifier: Apache-2.0
"""The picture of a run: ratios to stock by batch, with the noise of stock itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.overhead.modes import AGAIN, MODES, STOCK

STYLES = {
    "idle": ("o", "#0072b2"),
    "all-same": ("s", "#e69f00"),
    "all-distinct": ("D", "#d55e00"),
    "half-k": ("v", "#009e73"),
    "k-max": ("^", "#cc79a7"),
}
PANELS = (
    ("decode", "decode step", "requests in the batch"),
    ("prefill", "prefill", "requests x prompt tokens"),
)
SPREAD = 0.7  # of the distance between two sizes, for the modes side by side

Row = dict[str, Any]


def draw(run: dict[str, Any]) -> Figure:
    """Return decode and prefill ratios side by side, on one scale."""
    panels = [(panel, _rows(run, panel[0])) for panel in PANELS]
    panels = [(panel, rows) for panel, rows in panels if rows]
    widths = [max(2, len(_sizes(rows))) for _, rows in panels]
    figure = Figure(figsize=(2.6 + 1.5 * sum(widths), 4.6), layout="constrained")
    axes = figure.subplots(
        1, len(panels), width_ratios=widths, sharey=True, squeeze=False
    )
    for axis, (panel, rows) in zip(axes[0], panels, strict=True):
        _panel(axis, rows)
        axis.set_title(panel[1], fontsize=11)
        axis.set_xlabel(panel[2])
    axes[0, 0].set_ylabel("time / time of stock vLLM")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    figure.suptitle(_title(run["conditions"]), fontsize=10)
    return figure


def _rows(run: dict[str, Any], measure: str) -> list[Row]:
    return [row for row in run["summary"] if row["measure"] == measure]


def _sizes(rows: Sequence[Row]) -> list[str]:
    return sorted({row["size"] for row in rows}, key=lambda s: int(s.split("x")[0]))


def _panel(axis: Axes, rows: Sequence[Row]) -> None:
    sizes = _sizes(rows)
    axis.axhline(1, color="black", linewidth=0.8, zorder=1)
    for row in rows:
        if row["mode"] == AGAIN:
            _noise(axis, sizes.index(row["size"]), row)
    shown = [m for m in MODES if m != STOCK and any(r["mode"] == m for r in rows)]
    for index, mode in enumerate(shown):
        offset = SPREAD * ((index + 0.5) / len(shown) - 0.5)
        points = {row["size"]: row for row in rows if row["mode"] == mode}
        found = [(place + offset, points[s]) for place, s in enumerate(sizes)]
        _points(axis, mode, found)
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set_xlim(-0.55, len(sizes) - 0.45)
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _noise(axis: Axes, place: int, row: Row) -> None:
    # which of the two came first is chance: the further end counts for both sides
    reach = max(row["high"], 1 / row["low"])
    axis.fill_between(
        [place - 0.47, place + 0.47],
        1 / reach,
        reach,
        color="0.84",
        linewidth=0,
        zorder=0,
        label="stock against stock" if place == 0 else None,
    )


def _points(axis: Axes, mode: str, found: Sequence[tuple[float, Row]]) -> None:
    marker, color = STYLES[mode]
    ratios = [row["ratio"] for _, row in found]
    below = [row["ratio"] - row["low"] for _, row in found]
    above = [row["high"] - row["ratio"] for _, row in found]
    axis.errorbar(
        [place for place, _ in found],
        ratios,
        yerr=[below, above],
        fmt=marker,
        color=color,
        markersize=5,
        capsize=2.5,
        linewidth=1.2,
        label=mode,
    )


def _title(found: dict[str, Any]) -> str:
    flags = found["flags"]
    mode = "eager" if flags["eager"] else "CUDA graphs"
    return (
        f"{flags['model']}, {found['weights']} weights, {flags['dtype']}, {mode}; "
        f"{found['device']}, {found['vllm']}\n"
        "median over rounds of the ratio within a round; bars: 95 % bootstrap; "
        "band: the same of stock, mirrored at 1"
    )
