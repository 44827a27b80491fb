# SPDX-License-Identifier: Apache-2.0
"""Multiple choice: which choice is the likeliest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from scipy.special import logsumexp
from tqdm import tqdm

from benchmarks.quality.arms import Arm
from benchmarks.quality.journal import Journal
from benchmarks.quality.tasks.question import ChoiceQuestion


class Scorer(Protocol):
    """What gives log-likelihoods: transformers or vLLM."""

    def score(
        self, questions: Sequence[ChoiceQuestion], arms: Sequence[Arm]
    ) -> Iterator[tuple[int, dict[Arm, list[float]]]]:
        """Yield a question's index and its choices' log-likelihoods, in nats."""


class ChoiceJudge:
    """Multiple choice by log-likelihood.

    Args:
        make_scorer: Called when the first outcome is missing.
        normalisation: `raw` log-likelihood, or `per_char` of the choice.
    """

    def __init__(self, make_scorer: Callable[[], Scorer], normalisation: str):
        self.make_scorer = make_scorer
        self.normalisation = normalisation
        self.scorer: Scorer | None = None

    def check(
        self, questions: Sequence[ChoiceQuestion], arms: Sequence[Arm], journal: Journal
    ) -> None:
        """Accept every length: what a scorer cannot read, it refuses itself."""

    def answer(
        self, questions: Sequence[ChoiceQuestion], arms: Sequence[Arm], journal: Journal
    ) -> None:
        """Score the questions that lack an arm, under the arms that some lack."""
        todo = [
            question
            for question in questions
            if any((arm.name, question.id) not in journal for arm in arms)
        ]
        if not todo:
            return
        lacked = [
            arm
            for arm in arms
            if any((arm.name, question.id) not in journal for question in todo)
        ]
        self.scorer = self.scorer or self.make_scorer()
        scored = self.scorer.score(todo, lacked)
        for index, scores in tqdm(scored, journal.path.stem, len(todo)):
            for arm, values in scores.items():
                if (arm.name, todo[index].id) not in journal:
                    journal.add((arm.name, todo[index].id), values)

    def right(self, question: ChoiceQuestion, arm: Arm, journal: Journal) -> float:
        """Return 1 if the likeliest choice is the right one, the first of equals."""
        scores = journal[arm.name, question.id]
        return float(likeliest(question, scores, self.normalisation) == question.gold)

    def facts(
        self, questions: Sequence[ChoiceQuestion], arm: Arm, journal: Journal
    ) -> dict[str, Any]:
        """Return accuracies by normalisation, and what right choices have in nats.

        `gold_nats` are their log-likelihoods, `share_nats` the logarithms of their
        shares of all choices' likelihood.
        """
        scores = [journal[arm.name, question.id] for question in questions]
        pairs = list(zip(questions, scores, strict=True))
        found: dict[str, Any] = {
            f"accuracy_{name}": sum(likeliest(q, s, name) == q.gold for q, s in pairs)
            / len(questions)
            for name in ("raw", "per_char")
        }
        gold = [s[q.gold] for q, s in pairs]
        total = [float(logsumexp(s)) for s in scores]
        share = [g - t for g, t in zip(gold, total, strict=True)]
        found["gold_nats"] = [round(value, 3) for value in gold]
        found["share_nats"] = [round(value, 3) for value in share]
        return found


def likeliest(
    question: ChoiceQuestion, scores: Sequence[float], normalisation: str
) -> int:
    """Return the index of the choice with the highest score.

    Source: OLMES (arXiv 2406.08446): a choice's log-likelihood as it is, or divided by
    its length in characters.

    Args:
        question: Its choices.
        scores: Summed log-likelihood of each choice, in nats.
        normalisation: `raw` or `per_char`.
    """
    lengths = {
        "raw": [1] * len(scores),
        "per_char": [max(1, len(choice)) for choice in question.choices],
    }[normalisation]
    values = [score / length for score, length in zip(scores, lengths, strict=True)]
    return values.index(max(values))
