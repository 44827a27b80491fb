# SPDX-License-Identifier: Apache-2.0
"""Loss curves of rerouting on whole texts, without an engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe_tta.adapter.job import reroute
from moe_tta.adapter.model import AdapterModel
from moe_tta.adapter.rerouting import Rerouting, Round


def loss_curves(
    model: AdapterModel,
    sequences: Sequence[Sequence[int]],
    settings: Rerouting,
    batch: int = 8,
) -> list[Round]:
    """Adapt each text from zero, one round each.

    Texts of like length share a batch; results stand in the order given.

    Args:
        model: The adapter.
        sequences: Token ids of each text.
        settings: For all.
        batch: Texts adapted together.
    """
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
    rounds: dict[int, Round] = {}
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        zeros = torch.zeros(
            len(group), len(model.shape.layers), model.shape.num_experts
        )
        done = reroute(model, [sequences[index] for index in group], zeros, settings)
        rounds |= dict(zip(group, done, strict=True))
    return [rounds[index] for index in range(len(sequences))]
