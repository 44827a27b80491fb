# SPDX-License-Identifier: Apache-2.0
"""The protocol: every arm answers the tuning questions, the chosen ones the test."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from benchmarks.quality.arms import Arm
from benchmarks.quality.journal import Journal
from benchmarks.quality.statistics import accuracy, compare
from benchmarks.quality.tasks import Part, Question, Task, load

# options that change outcomes; a command has some of them
OUTCOME_OPTIONS = (
    *("shots", "dtype", "k_max", "max_tokens", "max_model_len", "temperature"),
    *("references", "k", "kernel", "layers", "steps", "lr", "device"),
)


class Judge(Protocol):
    """How one kind of task gets its outcomes and what they are worth."""

    def check(
        self, questions: Sequence[Question], arms: Sequence[Arm], journal: Journal
    ) -> None:
        """Raise a `ValueError` if an outcome that is missing could never be had."""

    def answer(
        self, questions: Sequence[Question], arms: Sequence[Arm], journal: Journal
    ) -> None:
        """Write what the model says into the journal, where it lacks it."""

    def right(self, question: Question, arm: Arm, journal: Journal) -> float:
        """Return 1 if the arm answered right, or the share of samples that did.

        Verdicts that take long to find are written into the journal, too.
        """

    def facts(
        self, questions: Sequence[Question], arm: Arm, journal: Journal
    ) -> dict[str, Any]:
        """Return what else is reported of an arm; JSON types."""


@dataclass(frozen=True)
class Answers:
    """Arms on one part of a task.

    Attributes:
        part: What was asked.
        ids: Of the questions, [n].
        files: SHA-256 of the data files.
        right: [n] in [0, 1], by arm.
        facts: What else the judge reports, by arm.
    """

    part: Part
    ids: tuple[str, ...]
    files: dict[str, str]
    right: dict[Arm, np.ndarray]
    facts: dict[Arm, dict[str, Any]]

    def best(self, family: str) -> Arm:
        """Return a family's arm with the most right answers, the first of equals."""
        arms = [arm for arm in self.right if arm.family == family]
        return max(arms, key=lambda arm: self.right[arm].mean())

    def as_json(self, reference: Arm) -> dict[str, Any]:
        """Return everything the tables are made of, raw answers included."""
        return {
            "part": str(self.part),
            "files": self.files,
            "ids": self.ids,
            "arms": [
                {
                    "name": arm.name,
                    "family": arm.family,
                    "request": arm.request,
                    "examples": [example.id for example in arm.examples],
                    **accuracy(right),
                    **self.facts[arm],
                    "against_reference": compare(right, self.right[reference]),
                    "right": [round(float(value), 6) for value in right],
                }
                for arm, right in self.right.items()
            ],
        }


def ask(
    args: argparse.Namespace, task: Task, part: Part, arms: Sequence[Arm], judge: Judge
) -> Answers:
    """Let arms answer a part's questions, going on where a killed run stopped.

    Args:
        args: The shared options.
        task: The task.
        part: Its `tune` or `test`.
        arms: Who answers.
        judge: For tasks of this kind.
    """
    questions, files, journal = write_down(args, task, part, arms, judge)
    right = {
        arm: np.array([judge.right(question, arm, journal) for question in questions])
        for arm in tqdm(arms, "judged")
    }
    facts = {arm: judge.facts(questions, arm, journal) for arm in arms}
    return Answers(part, tuple(q.id for q in questions), files, right, facts)


def write_down(
    args: argparse.Namespace, task: Task, part: Part, arms: Sequence[Arm], judge: Judge
) -> tuple[list[Question], dict[str, str], Journal]:
    """Journal what arms answer to a part's questions, and judge nothing.

    Args:
        args: The shared options.
        task: The task.
        part: Its `tune` or `test`.
        arms: Who answers.
        judge: For tasks of this kind.

    Returns:
        The questions, the SHA-256 of the data files, and the journal.
    """
    questions, files, journal = open_part(args, task, part, arms)
    judge.answer(questions, arms, journal)
    return questions, files, journal


def check(
    args: argparse.Namespace, task: Task, part: Part, arms: Sequence[Arm], judge: Judge
) -> None:
    """Refuse what some arm could not be asked, before any is.

    Args:
        args: The shared options.
        task: The task.
        part: Its `tune` or `test`.
        arms: Who may be asked.
        judge: For tasks of this kind.

    Raises:
        ValueError: with what to change.
    """
    questions, _, journal = open_part(args, task, part, arms)
    judge.check(questions, arms, journal)


def open_part(
    args: argparse.Namespace, task: Task, part: Part, arms: Sequence[Arm]
) -> tuple[list[Question], dict[str, str], Journal]:
    """Return a part's questions, the SHA-256 of its files, and its journal so far."""
    limit = args.tune if part is task.tune else args.test
    shown = {example.id for arm in arms for example in arm.examples}
    questions, files = load(task, part, args.data, args.shots, limit, args.seed, shown)
    name = "tune" if part is task.tune else "test"
    journal = Journal(folder_of(args) / f"{name}.jsonl", made_with(args, files))
    return questions, files, journal


def folder_of(args: argparse.Namespace) -> Path:
    """Return the folder of a run's journals."""
    return args.work / f"{args.command}-{args.model.resolve().name}-{args.task}"


def made_with(args: argparse.Namespace, files: dict[str, str]) -> dict[str, Any]:
    """Return what two outcomes must share to be compared."""
    given = vars(args)
    settings = {name: given[name] for name in OUTCOME_OPTIONS if name in given}
    return {
        "model": fingerprint(args.model),
        "files": files,
        "seed": args.seed,
        **settings,
    }


def fingerprint(folder: Path) -> str:
    """Return the SHA-256 of a checkpoint's config and of its files' names and sizes.

    Weights themselves are not read: they may be hundreds of gigabytes.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}\n".encode())
    return digest.hexdigest()
