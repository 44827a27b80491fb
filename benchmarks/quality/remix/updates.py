# SPDX-License-Identifier: Apache-2.0
"""Updates: from a batch to distributions [Q, layers, E] f32 of last prompt tokens.

Source: C3PO, arXiv 2504.07964, section 3.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from benchmarks.quality.remix.batch import Batch
from moe_tta.adapter import (
    GradientDescent,
    NeighbourTail,
    descend_neighbours,
    search_alpha,
)
from moe_tta.remix.offline import find_mode

Update = Callable[[Batch], torch.Tensor]

SEARCHED = 6  # alphas on each of two grids: steps of 0.2, then of 0.08


def own(batch: Batch) -> torch.Tensor:
    """The model's own routing."""
    return batch.own


def regression(batch: Batch) -> torch.Tensor:
    """Kernel regression with alpha 0: the neighbours' weighted mean."""
    return batch.nearest.mean


def blended(alpha: float) -> Update:
    """Kernel regression where the model's own routing keeps a share."""
    return lambda batch: alpha * batch.own + (1 - alpha) * batch.nearest.mean


def searched(batch: Batch) -> torch.Tensor:
    """Kernel regression with the alpha that costs the neighbours' answers least."""
    near = batch.nearest
    return search_alpha(near.tail, batch.own, near.mean, SEARCHED).omega


def mode(batch: Batch) -> torch.Tensor:
    """Mode finding: one step of mean shift among the nearest pathways, alpha 0."""
    study, how = batch.study, batch.study.look_up
    modes = [
        find_mode(study.store, one, study.layers, k=how.k, kernel=how.kernel)
        for one in batch.own.cpu().numpy()
    ]
    found = torch.from_numpy(np.stack(modes).astype(np.float32))
    return found.to(study.model.device)


def descent(settings: GradientDescent) -> Update:
    """Gradient descent on the neighbours' loss (NGD)."""
    return lambda batch: descended(batch.nearest.tail, batch.own, settings)


def oracle(settings: GradientDescent) -> Update:
    """Gradient descent on the questions' own labels: an upper bound."""
    return lambda batch: descended(batch.labels, batch.own, settings)


def random_regression(batch: Batch) -> torch.Tensor:
    """The mean of as many references drawn at random."""
    return batch.random.mean


def random_descent(settings: GradientDescent) -> Update:
    """Gradient descent on the loss of as many references drawn at random."""
    return lambda batch: descended(batch.random.tail, batch.own, settings)


def descended(
    tail: NeighbourTail, start: torch.Tensor, settings: GradientDescent
) -> torch.Tensor:
    """Descend from `start`.

    Raises:
        FloatingPointError: a loss or gradient is not finite.
    """
    done = descend_neighbours(tail, start, settings)
    if not done.finite.all():
        raise FloatingPointError("gradient descent on the answers' loss: not finite")
    return done.omega
