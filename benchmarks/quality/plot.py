# SPDX-License-Identifier: Apache-2.0
"""Accuracy on the tuning part over beta, one panel a task and model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.quality.arms import label

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3
LOWEST, LOWEST_TOP = -0.02, 0.1  # limits of an axis where all is wrong


def sweeps(results: list[dict[str, Any]]) -> Figure:
    """Draw the beta sweeps of contrast results, the plain arm as a line.

    Bars are 95 % bootstrap intervals of the accuracy; they are not paired, so that
    overlapping bars do not show that arms are equal.
    """
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(results))
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), layout="constrained")
    panels = [figure.add_subplot(rows, columns, i + 1) for i in range(len(results))]
    colours: dict[str, str] = {}  # the same for an arm in every panel
    lines: dict[str, object] = {}
    for panel, result in zip(panels, results, strict=True):
        arms = result["tune"]["arms"]
        plain = next(arm for arm in arms if arm["family"] == "plain")
        lines["plain"] = panel.axhline(plain["accuracy"], color="black", linewidth=1)
        panel.axhspan(plain["low"], plain["high"], color="black", alpha=0.08)
        for number, (name, points) in enumerate(_series(arms).items()):
            x = [beta + 0.012 * number for beta, _ in points]
            y = [arm["accuracy"] for _, arm in points]
            low = [arm["accuracy"] - arm["low"] for _, arm in points]
            high = [arm["high"] - arm["accuracy"] for _, arm in points]
            colour = colours.setdefault(name, f"C{len(colours)}")
            lines[name] = panel.errorbar(
                x, y, (low, high), marker="o", capsize=2, color=colour
            )
        model = result["conditions"]["flags"]["model"]
        panel.set_title(f"{model}, {result['task']}, n = {plain['n']}", size="medium")
        bottom, top = panel.get_ylim()
        panel.set_ylim(max(bottom, LOWEST), max(top, LOWEST_TOP))
        panel.set_xlabel("beta")
    figure.supylabel("accuracy on the tuning part", fontsize="medium")
    figure.legend(
        lines.values(), lines.keys(), loc="outside lower center", ncols=len(lines)
    )
    return figure


def _series(arms: list[dict[str, Any]]) -> dict[str, list[tuple[float, dict]]]:
    """Group contrast arms by weak routing and alpha."""
    found: dict[str, list[tuple[float, dict]]] = {}
    for arm in arms:
        if arm["family"] == "contrast":
            given = arm["request"]["contrast"]
            name = f"{label(given['weak'])}, alpha {given['alpha']}"
            found.setdefault(name, []).append((given["beta"], arm))
    return found
