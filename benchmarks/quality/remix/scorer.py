# SPDX-License-Identifier: Apache-2.0
"""Questions in batches of like length, each under every arm."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from benchmarks.quality.arms import Arm
from benchmarks.quality.remix.batch import Batch, Study
from benchmarks.quality.remix.methods import Method
from benchmarks.quality.tasks.question import ChoiceQuestion

BATCH = 8  # questions


class RemixScorer:
    """Scores choices by the adapter.

    Args:
        study: What all batches share.
        methods: How each arm scores.
    """

    def __init__(self, study: Study, methods: Mapping[Arm, Method]):
        self.study, self.methods = study, methods

    def score(
        self, questions: Sequence[ChoiceQuestion], arms: Sequence[Arm]
    ) -> Iterator[tuple[int, dict[Arm, list[float]]]]:
        """Score questions.

        Yields:
            Index of a question, and for each arm the summed log-likelihood, in nats,
            of its choices.
        """
        # a batch is padded to its longest text
        order = sorted(range(len(questions)), key=lambda i: _length(questions[i]))
        for first in range(0, len(order), BATCH):
            group = order[first : first + BATCH]
            batch = Batch(self.study, [questions[index] for index in group])
            scores = {arm: self.methods[arm](batch) for arm in arms}
            for place, index in enumerate(group):
                yield index, {arm: values[place] for arm, values in scores.items()}


def _length(question: ChoiceQuestion) -> int:
    pairs = zip(question.contexts, question.choices, strict=True)
    return max(len(context) + len(choice) for context, choice in pairs)
