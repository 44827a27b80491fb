# SPDX-License-Identifier: Apache-2.0
"""GSM8K from its authors' files."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.quality.tasks.question import TextQuestion

CALCULATION = re.compile(r"<<.*?>>")  # calculator marks inside the solutions


def read_problems(path: Path, shots: int) -> list[TextQuestion]:
    """Read the problems, asked as lm-eval's `gsm8k` asks them.

    Worked examples are the first problems of `train.jsonl`; tuning leaves them out.
    """
    worked = _rows(path.with_name("train.jsonl"))[:shots] if shots else []
    head = "".join(f"{_asked(r)}{_solution(r)}\n\n" for r in worked)
    skip = shots if path.name == "train.jsonl" else 0
    return [
        TextQuestion(
            f"{path.stem}/{i}",
            head + _asked(row),
            row["answer"].rsplit("####", 1)[1].strip().replace(",", ""),
            _solution(row),
        )
        for i, row in enumerate(_rows(path))
        if i >= skip
    ]


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def _asked(row: dict) -> str:
    return f"Question: {row['question']}\nAnswer:"


def _solution(row: dict) -> str:
    return " " + CALCULATION.sub("", row["answer"])
