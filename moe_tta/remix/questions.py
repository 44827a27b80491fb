# SPDX-License-Identifier: Apache-2.0
"""Reference questions: a jsonl file, one object a line."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from moe_tta.remix.errors import StoreError

Score = Literal["raw", "per_char"]
Text = Annotated[str, Field(min_length=1)]


class Question(BaseModel):
    """One reference question with its answer.

    Attributes:
        prompt: What the model reads; its last token's pathway is recorded.
        choices: Possible answers; the model's is the likeliest after the prompt and
            one space.
        gold: Index of the right choice.
        answers: Texts of which any is right, instead of choices: the model's is what it
            generates, to the end of the line.
        text: What is embedded to find the question again; default the prompt.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    prompt: Text
    choices: Annotated[tuple[Text, ...], Strict(False)] = ()
    gold: Annotated[int, Field(ge=0)] | None = None
    answers: Annotated[tuple[Text, ...], Strict(False)] = ()
    text: Text | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Question:
        if bool(self.choices) == bool(self.answers):
            raise PydanticCustomError("kind", "expected either choices or answers")
        if self.choices and not (
            self.gold is not None and self.gold < len(self.choices)
        ):
            raise PydanticCustomError("gold", "expected gold, the index of a choice")
        if self.answers and self.gold is not None:
            raise PydanticCustomError("gold", "expected gold with choices only")
        return self

    @property
    def label(self) -> str:
        """The right answer: the gold choice, or the first of `answers`."""
        return self.choices[self.gold] if self.choices else self.answers[0]

    @property
    def embedded(self) -> str:
        """The text that is embedded."""
        return self.prompt if self.text is None else self.text


def read_questions(path: Path) -> Iterator[Question]:
    """Yield the questions of a jsonl file, in order; empty lines are skipped.

    Raises:
        StoreError: a line is no question; names it.
    """
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield Question.model_validate_json(line)
            except ValidationError as err:
                first = err.errors(include_url=False)[0]
                where = ".".join(map(str, first["loc"])) or "line"
                raise StoreError(f"{path}:{number}: {where}: {first['msg']}") from err


def normalise(answer: str) -> str:
    """Return an answer's words: lower case, no punctuation, articles or extra space.

    Source: the normalisation of SQuAD's exact match (arXiv 1606.05250).
    """
    bare = answer.lower().translate(str.maketrans("", "", string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def is_right(generated: str, answers: tuple[str, ...]) -> bool:
    """Say whether the first line of a text equals any answer, both normalised."""
    first_line = generated.strip().split("\n")[0]
    return normalise(first_line) in {normalise(answer) for answer in answers}


def chosen(log_likelihoods: list[float], choices: tuple[str, ...], score: Score) -> int:
    """Return the likeliest choice, ties by place.

    Args:
        log_likelihoods: Summed log-likelihood of each choice, in nats.
        choices: The choices.
        score: `raw` compares the sums, `per_char` divides them by the choice's
            characters.
    """
    values = log_likelihoods
    if score == "per_char":
        pairs = zip(log_likelihoods, choices, strict=True)
        values = [value / len(choice) for value, choice in pairs]
    return max(range(len(values)), key=values.__getitem__)
