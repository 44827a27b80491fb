# SPDX-License-Identifier: Apache-2.0
"""Pictures of routing; they need the extra `viz`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

SHARE_MAP = "viridis"
DIFFERENCE_MAP = "RdBu_r"


def routing_heat_map(
    before: np.ndarray,
    after: np.ndarray,
    layers: Sequence[int],
    titles: tuple[str, str, str] = ("before", "after", "difference"),
) -> Figure:
    """Draw how often each expert of each layer is used, twice, and the difference.

    Args:
        before: [L, E] share of tokens that use each expert, in [0, 1].
        after: [L, E] the same, after a change.
        layers: Decoder layer of each row.
        titles: Of the three panels.

    Returns:
        A figure that belongs to no window; save it with `savefig`.

    Raises:
        ValueError: the arrays are not both [L, E].
    """
    from matplotlib.figure import Figure

    if before.shape != after.shape or before.shape[0] != len(layers):
        raise ValueError(
            f"expected two arrays [{len(layers)}, E], got {before.shape} and "
            f"{after.shape}"
        )
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    top = max(before.max(), after.max(), 1e-9)
    reach = max(np.abs(after - before).max(), 1e-9)
    shares = [
        _panel(ax, array, title, cmap=SHARE_MAP, vmin=0, vmax=top)
        for ax, array, title in zip(axes[:2], (before, after), titles[:2], strict=True)
    ]
    change = _panel(
        axes[2],
        after - before,
        titles[2],
        cmap=DIFFERENCE_MAP,
        vmin=-reach,
        vmax=reach,
    )
    _label_layers(axes[0], layers)
    figure.colorbar(shares[0], ax=axes[:2], label="share of tokens using the expert")
    figure.colorbar(change, ax=axes[2], label="change of that share")
    return figure


def _panel(ax: Axes, array: np.ndarray, title: str, **colours: object) -> AxesImage:
    image = ax.imshow(array, aspect="auto", interpolation="nearest", **colours)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("expert")
    step = max(1, array.shape[1] // 8)
    ax.set_xticks(range(0, array.shape[1], step))
    return image


def _label_layers(ax: Axes, layers: Sequence[int]) -> None:
    step = max(1, len(layers) // 10)
    rows = range(0, len(layers), step)
    ax.set_yticks(rows, [str(layers[row]) for row in rows])
    ax.set_ylabel("layer")
