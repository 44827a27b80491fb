# SPDX-License-Identifier: Apache-2.0
"""What rounds did to the loss of the text they read, one panel an arm."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3


def losses_of_rounds(results: list[dict[str, Any]], role: str = "test") -> Figure:
    """Draw how the loss changed in each adapted round, over where it began.

    Points below the line at 0 are rounds in which the loss fell.

    Args:
        results: As read.
        role: `test` or `tune`.

    Raises:
        ValueError: no arm had rounds.
    """
    from matplotlib.figure import Figure

    drawn = [
        (f"{result['task']}\n{arm['name']}", arm)
        for result in results
        for arm in result[role]["arms"]
        if arm.get("rounds", {}).get("losses")
    ]
    if not drawn:
        raise ValueError("no arm of these results had rounds")
    columns = min(COLUMNS, math.isqrt(len(drawn) - 1) + 1)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    for place, (title, arm) in enumerate(drawn, 1):
        panel = figure.add_subplot(rows, columns, place)
        losses = arm["rounds"]["losses"]
        first = [(before, after) for number, before, after in losses if number == 0]
        later = [(before, after) for number, before, after in losses if number > 0]
        kinds = [("first rounds", first), ("later rounds", later)]
        for label, pairs in [(label, pairs) for label, pairs in kinds if pairs]:
            x = [before for before, _ in pairs]
            y = [after - before for before, after in pairs]
            panel.scatter(x, y, s=8, alpha=0.5, label=f"{len(pairs)} {label}")
        panel.axhline(0, color="black", linewidth=1)
        panel.set_title(title, fontsize="small")
        panel.legend(fontsize="small")
    figure.supxlabel("loss before the round, nats a token", fontsize="medium")
    figure.supylabel("change by the round", fontsize="medium")
    return figure
