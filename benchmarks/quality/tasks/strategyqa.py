# SPDX-License-Identifier: Apache-2.0
"""StrategyQA: yes or no, from its authors' files."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.quality.tasks.question import ChoiceQuestion, DataError, TextQuestion

YES_NO = ("no", "yes")  # index = the published truth value


def read_choices(path: Path, shots: int) -> list[ChoiceQuestion]:
    """Read the questions, answered by the likelier of "yes" and "no".

    Raises:
        DataError: worked examples are asked for.
    """
    if shots:
        raise DataError("strategyqa by log-likelihood has no worked examples")
    return [
        ChoiceQuestion(
            row["qid"],
            (f"Question: {row['question']}\nAnswer:",) * 2,
            YES_NO,
            int(row["answer"]),
        )
        for row in json.loads(path.read_text("utf-8"))
    ]


def read_texts(path: Path, shots: int) -> list[TextQuestion]:
    """Read the questions, answered by a text that ends in yes or no.

    Worked examples are the first questions of `train.json` with the facts they rest
    on; tuning leaves these questions out.
    """
    rows = json.loads(path.read_text("utf-8"))
    worked = json.loads(path.with_name("train.json").read_text("utf-8"))[:shots]
    head = "".join(f"{_asked(row)}{_solution(row)}\n\n" for row in worked)
    used = {row["qid"] for row in worked}
    return [
        TextQuestion(
            row["qid"], head + _asked(row), YES_NO[row["answer"]], _solution(row)
        )
        for row in rows
        if row["qid"] not in used
    ]


def _asked(row: dict) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _solution(row: dict) -> str:
    facts = " ".join(row["facts"])
    return f" {facts} So the answer is {YES_NO[row['answer']]}."
