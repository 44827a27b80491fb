# SPDX-License-Identifier: Apache-2.0
"""Generated answers: asked of vLLM, judged by what they end in or by running them."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from benchmarks.quality.answers import majority
from benchmarks.quality.arms import Arm
from benchmarks.quality.engine import Engine, sampling_params
from benchmarks.quality.journal import Journal
from benchmarks.quality.sandbox import run_program
from benchmarks.quality.tasks.code import COMPLETION
from benchmarks.quality.tasks.question import Task, TextQuestion

Key = tuple[str, str, int]  # arm, question, sample


class TextJudge:
    """Greedy or sampled texts.

    Args:
        engine: Writes them.
        task: Says how they end and are judged.
        args: The shared options.
    """

    def __init__(self, engine: Engine, task: Task, args: argparse.Namespace):
        self.engine = engine
        self.task = task
        self.args = args

    def answer(
        self, questions: Sequence[TextQuestion], arms: Sequence[Arm], journal: Journal
    ) -> None:
        """Generate the texts that are missing, then run programs that were not."""
        todo = {
            (arm.name, question.id, sample): (arm, question)
            for question in questions
            for arm in arms
            for sample in range(self.args.samples)
        }
        missing = [key for key in todo if key not in journal]
        requests = [
            ({"prompt": todo[key][1].prompt}, self._params(todo[key][0], key))
            for key in missing
        ]
        if requests:
            answers = self.engine.run(requests)
            for index, output in tqdm(answers, journal.path.stem, len(missing)):
                done = output.outputs[0]
                outcome = {
                    "text": done.text,
                    "tokens": len(done.token_ids),
                    "finish": done.finish_reason,
                }
                journal.add(missing[index], outcome)
        if self.task.kind == "code":
            self._run_programs(todo, journal)

    def right(self, question: TextQuestion, arm: Arm, journal: Journal) -> float:
        """Return 1 for the right answer; for programs, the share that passes."""
        keys = [(arm.name, question.id, i) for i in range(self.args.samples)]
        if self.task.kind == "code":
            passed = [journal[("run", *key)] == "passed" for key in keys]
            return sum(passed) / len(passed)
        texts = [journal[key]["text"] for key in keys]
        found = majority([self.task.extract(text) for text in texts])
        return float(found == question.gold)

    def facts(
        self, questions: Sequence[TextQuestion], arm: Arm, journal: Journal
    ) -> dict[str, float]:
        """Return mean tokens of an answer, and the share that ran into the limit."""
        outcomes = [
            journal[(arm.name, question.id, sample)]
            for question in questions
            for sample in range(self.args.samples)
        ]
        cut = [outcome["finish"] == "length" for outcome in outcomes]
        return {
            "mean_tokens": sum(o["tokens"] for o in outcomes) / len(outcomes),
            "cut_off": sum(cut) / len(cut),
        }

    def _params(self, arm: Arm, key: Key) -> Any:
        return sampling_params(
            arm,
            max_tokens=self.args.max_tokens,
            temperature=self.args.temperature,
            stop=list(self.task.stop),
            seed=sample_seed(self.args.seed, key[1], key[2]),
        )

    def _run_programs(
        self, todo: dict[Key, tuple[Arm, TextQuestion]], journal: Journal
    ) -> None:
        missing = [key for key in todo if ("run", *key) not in journal]
        for key in tqdm(missing, "programs"):
            completion = journal[key]["text"]
            program = todo[key][1].gold.replace(COMPLETION, completion)
            journal.add(("run", *key), run_program(program).verdict)


def sample_seed(seed: int, question: str, sample: int) -> int:
    """Return a sample's seed: the same for every arm, another for every question."""
    text = f"{seed}/{question}/{sample}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
