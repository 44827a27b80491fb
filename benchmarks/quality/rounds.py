# SPDX-License-Identifier: Apache-2.0
"""What happened in the rounds of requests that adapt while they run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

ADAPTED = "adapted"  # the outcome of a round that worked out

Report = Mapping[str, Any]


def summary(answers: Sequence[Sequence[Report]]) -> dict[str, Any]:
    """Sum up the rounds of an arm's texts.

    Args:
        answers: Reports of each text's rounds, as docs/strategies/reroute.md describes
            them; empty where a text had none.

    Returns:
        texts: How many texts, and how many of them `adapted` at least once.
        outcomes: Rounds by outcome; all but "adapted" left the request as it was.
        token_steps: Tokens of context times steps of descent, mean of a text.
        milliseconds: The worker's time for rounds, mean of a text.
        fallen, before, after: Of the adapted rounds, the share that ended with less
            loss than it began with, and mean losses in nats a token; `None` without.
        by_round: The same for each number of the round, from 0.
        losses: [round, before, after] of every adapted round.
    """
    reports = [report for rounds in answers for report in rounds]
    adapted = [report for report in reports if report["outcome"] == ADAPTED]
    losses = [
        [each["round"], round(each["losses"][0], 5), round(each["losses"][-1], 5)]
        for each in adapted
    ]
    numbers = sorted({number for number, _, _ in losses})
    return {
        "texts": len(answers),
        "adapted": sum(
            any(each["outcome"] == ADAPTED for each in rounds) for rounds in answers
        ),
        "outcomes": dict(Counter(report["outcome"] for report in reports)),
        "token_steps": sum(map(_token_steps, reports)) / len(answers),
        "milliseconds": sum(each["milliseconds"] for each in reports) / len(answers),
        **_fall([pair for _, *pair in losses]),
        "by_round": [
            {"round": number, **_fall([pair for n, *pair in losses if n == number])}
            for number in numbers
        ],
        "losses": losses,
    }


def _token_steps(report: Report) -> int:
    # one loss before each step and one at the end; a round that failed has none
    return report["context"] * max(0, len(report.get("losses", ())) - 1)


def _fall(pairs: Sequence[Sequence[float]]) -> dict[str, Any]:
    if not pairs:
        return {"rounds": 0, "fallen": None, "before": None, "after": None}
    return {
        "rounds": len(pairs),
        "fallen": fmean(after < before for before, after in pairs),
        "before": fmean(before for before, _ in pairs),
        "after": fmean(after for _, after in pairs),
    }
