# SPDX-License-Identifier: Apache-2.0
"""Which layers a round adapts, and how much, from how sure their routers are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def hard_choice(uncertainty: torch.Tensor, share: float, sign: int) -> torch.Tensor:
    """Choose each request's top share of layers, at least one.

    Source: Rewiring Experts on the Fly (arXiv 2510.14853), layer score C_l. The
    formula is largest where routers are *un*certain, while its text calls such layers
    decisive; so both readings are offered.

    Args:
        uncertainty: [R, L], C_l in nats.
        share: Of the layers, in (0, 1].
        sign: 1 takes the largest C_l (the formula), -1 the smallest (the text).

    Returns:
        [R, L] bool; ties go to the lower layer.
    """
    count = max(1, math.floor(share * uncertainty.shape[1] + 0.5))
    order = (sign * uncertainty).sort(dim=1, descending=True, stable=True).indices
    chosen = torch.zeros_like(uncertainty, dtype=torch.bool)
    return chosen.scatter(1, order[:, :count], True)


def soft_choice(uncertainty: torch.Tensor, sign: int) -> torch.Tensor:
    """Weigh each request's layers by softmax of `sign` times C_l; the mean is 1.

    Source: as `hard_choice`. Differs: the paper's weight is unconfirmed; this is ours.

    Returns:
        [R, L].
    """
    return torch.softmax(sign * uncertainty, dim=1) * uncertainty.shape[1]


def named_choice(
    shape: tuple[int, int], places: Sequence[int], device: torch.device
) -> torch.Tensor:
    """Choose the same layers for every request.

    Args:
        shape: R and L.
        places: Positions of the layers, 0 .. L - 1.
        device: Of the result.
    """
    chosen = torch.zeros(shape, dtype=torch.bool, device=device)
    chosen[:, list(places)] = True
    return chosen
