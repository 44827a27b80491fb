# SPDX-License-Identifier: Apache-2.0
"""Several questions with all their choices as one sequence, nothing read twice.

The tokens that all choices of a question begin with stand once; the rest of each
choice follows. An attention mask lets a token see its question's shared tokens and its
own choice's earlier ones, at the positions they would have if they stood alone, so that
the packed logits are those of separate sequences.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from benchmarks.quality.tasks.question import ChoiceQuestion


@dataclass(frozen=True)
class Encoded:
    """A question in tokens.

    Attributes:
        sequences: Context and choice, for each choice.
        starts: Index of the first answer token of each sequence.
    """

    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @property
    def shared(self) -> int:
        """Length of what all sequences begin with, answers left out."""
        columns = zip(*self.sequences, strict=False)
        same = 0
        for column in columns:
            if same == min(self.starts) or len(set(column)) > 1:
                break
            same += 1
        return same

    @property
    def num_tokens(self) -> int:
        """Tokens once packed."""
        branches = sum(len(sequence) - self.shared for sequence in self.sequences)
        return self.shared + branches


def encode(tokenizer: Tokenizer, question: ChoiceQuestion) -> Encoded:
    """Split a question into tokens; context and choice are joined by one space.

    Raises:
        ValueError: a choice adds no token to its context.
    """
    sequences, starts = [], []
    for context, choice in zip(question.contexts, question.choices, strict=True):
        whole = tokenizer.encode(f"{context} {choice}").ids
        start = len(tokenizer.encode(context).ids)
        if not 0 < start < len(whole):
            raise ValueError(f"question {question.id}: choice {choice!r} has no tokens")
        sequences.append(tuple(whole))
        starts.append(start)
    return Encoded(tuple(sequences), tuple(starts))


@dataclass(frozen=True)
class Pack:
    """T tokens of Q questions with N answer tokens in C choices.

    Attributes:
        tokens: [1, T] int64.
        positions: [1, T] int64: of each token in its own sequence.
        visible: [1, 1, T, T] bool: which tokens (last axis) a token sees.
        predictors: [N] int64: packed index whose logits predict an answer token.
        targets: [N] int64: that token.
        choice: [N] int64: the choice it belongs to, numbered through the pack.
        sizes: Choices of each question.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    visible: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    choice: torch.Tensor
    sizes: tuple[int, ...]


def pack(questions: Sequence[Encoded]) -> Pack:
    """Lay questions out one after another."""
    tokens: list[int] = []
    positions: list[int] = []
    answers: list[tuple[int, int, int]] = []  # predictor, target, choice
    spans: list[tuple[int, int, int, int]] = []  # shared begin, end, own begin, end
    number = 0
    for question in questions:
        begin, shared = len(tokens), question.shared
        tokens += question.sequences[0][:shared]
        positions += range(shared)
        spans.append((begin, begin, begin, begin + shared))
        for sequence, start in zip(question.sequences, question.starts, strict=True):
            own = len(tokens)
            tokens += sequence[shared:]
            positions += range(shared, len(sequence))
            spans.append((begin, begin + shared, own, len(tokens)))
            for place in range(start, len(sequence)):
                before = place - 1
                index = begin + before if before < shared else own + before - shared
                answers.append((index, sequence[place], number))
            number += 1
    visible = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for low, high, own, end in spans:
        visible[own:end, low:high] = True
        visible[own:end, own:end] = torch.ones(end - own, end - own).tril().bool()
    predictors, targets, choice = torch.tensor(answers).unbind(1)
    return Pack(
        torch.tensor([tokens]),
        torch.tensor([positions]),
        visible[None, None],
        predictors,
        targets,
        choice,
        tuple(len(question.sequences) for question in questions),
    )


def packs(questions: Sequence[Encoded], budget: int) -> Iterator[list[int]]:
    """Group questions, in their order, into packs of at most `budget` tokens.

    A longer question gets a pack of its own.

    Yields:
        Indices of the questions of one pack.
    """
    group: list[int] = []
    used = 0
    for index, question in enumerate(questions):
        if group and used + question.num_tokens > budget:
            yield group
            group, used = [], 0
        group.append(index)
        used += question.num_tokens
    if group:
        yield group


def sums_by_choice(log_probs: torch.Tensor, packed: Pack) -> list[float]:
    """Add up the log-probabilities [N] of each choice's tokens."""
    sums = torch.zeros(sum(packed.sizes), dtype=torch.float64)
    return sums.index_add_(0, packed.choice, log_probs.double().cpu()).tolist()
