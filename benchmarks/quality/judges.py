# SPDX-License-Identifier: Apache-2.0
"""Which judge a task needs; models are loaded when the first answer is missing."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

from benchmarks.quality.arms import Arm
from benchmarks.quality.choices import ChoiceJudge
from benchmarks.quality.study import Judge
from benchmarks.quality.tasks.question import Task
from moe_tta.shape import RouterShape


@contextmanager
def judge_for(
    task: Task,
    args: argparse.Namespace,
    shape: RouterShape,
    arms: Sequence[Arm],
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[Judge]:
    """Yield the judge of a task.

    Choices are scored in transformers under the same plans where an arm has two
    streams, since vLLM gives no prompt log-probabilities of these, and then for every
    arm: differences are the routing's, not the library's. Otherwise vLLM scores them.
    Texts are always vLLM's.

    Args:
        task: The task.
        args: The shared options.
        shape: The model's routers.
        arms: Every arm that will be asked for.
        settings: More of the operator's settings for vLLM.
    """
    if task.kind == "choice" and any(arm.compiled(shape).pair for arm in arms):
        from benchmarks.quality.teacher_forced import TeacherForced

        def load() -> TeacherForced:
            return TeacherForced(args.model, shape, arms, args.dtype)

        yield ChoiceJudge(load, task.normalisation)
        return
    from benchmarks.quality.engine import Engine

    with Engine(args, shape, settings) as engine:
        if task.kind == "choice":
            from benchmarks.quality.prompt_scores import PromptScores

            yield ChoiceJudge(lambda: PromptScores(engine), task.normalisation)
            return
        from benchmarks.quality.texts import TextJudge

        yield TextJudge(engine, task, args)
