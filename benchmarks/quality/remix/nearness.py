# SPDX-License-Identifier: Apache-2.0
"""How near the neighbours are, and how far their pathways would move a question's.

Explains the arms: neighbours whose pathways are no nearer than those of random
references carry nothing of the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.quality.remix.batch import Batch, Group
from benchmarks.quality.remix.scorer import BATCH
from benchmarks.quality.remix.study import Study
from benchmarks.quality.tasks.question import ChoiceQuestion


@dataclass(frozen=True)
class Nearness:
    """One question's references.

    Attributes:
        similarity: Cosine of the text to its nearest reference's.
        same_answer: Share of neighbours whose right answer is this question's.
        moved: Total variation, 0..1, from the own distribution to the neighbours' mean,
            the mean of the covered layers.
        moved_random: The same to the mean of random references.
        kept: Share of the experts of the own distribution that the neighbours' mean
            chooses too, the mean of the covered layers.
        kept_random: The same of random references.
    """

    similarity: float
    same_answer: float
    moved: float
    moved_random: float
    kept: float
    kept_random: float


def describe(study: Study, questions: Sequence[ChoiceQuestion]) -> dict[str, Any]:
    """Return the means of `Nearness`, and the similarity of each question."""
    found = []
    for first in range(0, len(questions), BATCH):
        batch = Batch(study, questions[first : first + BATCH])
        found += [asdict(one) for one in nearness(batch)]
    means = {name: float(np.mean([one[name] for one in found])) for name in found[0]}
    similarities = [round(one["similarity"], 4) for one in found]
    return means | {"similarities": similarities}


def nearness(batch: Batch) -> Iterator[Nearness]:
    """Yield the batch's questions in turn."""
    near, random = _moves(batch, batch.nearest), _moves(batch, batch.random)
    for place, question in enumerate(batch.questions):
        answer = question.choices[question.gold].casefold()
        labels = [one.label.casefold() for one in batch.nearest.questions[place]]
        yield Nearness(
            similarity=float(batch.nearest.borrowed[place].similarities.max()),
            same_answer=labels.count(answer) / len(labels),
            moved=float(near[0][place]),
            moved_random=float(random[0][place]),
            kept=float(near[1][place]),
            kept_random=float(random[1][place]),
        )


def _moves(batch: Batch, group: Group) -> tuple[torch.Tensor, torch.Tensor]:
    """Total variation [Q], and share of experts that stay [Q]."""
    own, mean, width = batch.own, group.mean, batch.study.model.shape.top_k
    apart = (own - mean).abs().sum(dim=-1) / 2
    chosen = own.topk(width).indices[..., :, None]
    stay = (chosen == mean.topk(width).indices[..., None, :]).any(dim=-1)
    return apart.mean(dim=1), stay.float().mean(dim=(1, 2))
