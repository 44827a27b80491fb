# SPDX-License-Identifier: Apache-2.0
"""Questions, and the parts of a data set that are tuned on and reported."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question answered by the likeliest of several continuations.

    Attributes:
        id: Unique within its task.
        contexts: One for each choice; equal ones but for WinoGrande.
        choices: Continuations, joined to their context by one space.
        gold: Index of the right choice.
    """

    id: str
    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TextQuestion:
    """A question answered by generated text.

    Attributes:
        id: Unique within its task.
        prompt: What the model continues.
        gold: The right answer; for code, the program that checks the text, with
            `{completion}` where it goes.
        solution: What rightly follows the prompt, for worked examples.
    """

    id: str
    prompt: str
    gold: str
    solution: str = ""


Question = ChoiceQuestion | TextQuestion


def worked(examples: Iterable[TextQuestion]) -> str:
    """Return answered questions as they stand before another question."""
    return "".join(f"{each.prompt}{each.solution}\n\n" for each in examples)


@dataclass(frozen=True)
class Part:
    """One part of a published data set.

    Where a set has only one published split, two parts share its questions out by a
    hash of their ids.

    Attributes:
        split: What the publisher calls it.
        files: Glob pattern inside the data folder.
        low, high: The questions whose hash, a number in [0, 1), lies in [low, high).
    """

    split: str
    files: str
    low: float = 0.0
    high: float = 1.0

    def holds(self, id: str) -> bool:
        """Whether a question belongs to this part."""
        place = int(hashlib.sha256(id.encode()).hexdigest()[:12], 16) / 16**12
        return self.low <= place < self.high

    def __str__(self) -> str:
        whole = (self.low, self.high) == (0.0, 1.0)
        share = "" if whole else f", hash of id in [{self.low}, {self.high})"
        return f"{self.split}{share}"


@dataclass(frozen=True)
class Task:
    """A benchmark: where its questions lie and how answers are judged.

    Attributes:
        name: On the command line.
        kind: `choice` by log-likelihood; of generated text, `answer` by what it ends
            in and `code` by running it.
        read: From a file and the number of worked examples to its questions.
        tune: Part that settings are chosen on.
        test: Part that is reported.
        normalisation: Of a choice's log-likelihood: `raw` or `per_char`.
        stop: Strings that end a generated answer.
        extract: For `answer`: from a text to its answer, in the form of `gold`.
    """

    name: str
    kind: Literal["choice", "answer", "code"]
    read: Callable[[Path, int], list[Question]]
    tune: Part
    test: Part
    normalisation: Literal["raw", "per_char"] = "raw"
    stop: tuple[str, ...] = ()
    extract: Callable[[str], str | None] | None = None


class DataError(ValueError):
    """A data set is not where it should be or is not what it should be."""
