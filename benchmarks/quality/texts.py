# SPDX-License-Identifier: Apache-2.0
"""Generated answers: asked of vLLM, judged by what they end in or by running them."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from benchmarks.quality.answers import majority
from benchmarks.quality.arms import Arm, Vote
from benchmarks.quality.engine import Engine, sampling_params
from benchmarks.quality.journal import Journal
from benchmarks.quality.prompts import check_lengths, prompt
from benchmarks.quality.rounds import summary
from benchmarks.quality.sandbox import run_program
from benchmarks.quality.tasks.code import COMPLETION
from benchmarks.quality.tasks.question import Task, TextQuestion

if TYPE_CHECKING:
    from vllm import RequestOutput

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

    def check(
        self, questions: Sequence[TextQuestion], arms: Sequence[Arm], journal: Journal
    ) -> None:
        """Refuse prompts that leave no room for an answer, before vLLM does.

        Raises:
            ValueError: with the arm, the question and the option to change.
        """
        missing = self._missing(questions, arms, journal).values()
        if missing:
            check_lengths(list(missing), self.args)

    def answer(
        self, questions: Sequence[TextQuestion], arms: Sequence[Arm], journal: Journal
    ) -> None:
        """Generate the texts that are missing, one arm after the other.

        So the requests that run at a time mostly are alike: they share the examples
        before their questions, and rounds that ask for the same work can be one job.
        """
        missing = self._missing(questions, arms, journal)
        keys = list(missing)
        requests = [
            ({"prompt": prompt(arm, question)}, self._params(arm, key))
            for key, (arm, question) in missing.items()
        ]
        if requests:
            answers = self.engine.run(requests)
            for index, output in tqdm(answers, journal.path.stem, len(keys)):
                journal.add(keys[index], outcome(output))

    def right(self, question: TextQuestion, arm: Arm, journal: Journal) -> float:
        """Return 1 for the right answer; for programs, the share that passes.

        Raises:
            SandboxError: a program was not run yet, and cannot be confined here.
        """
        keys = self._keys(question, arm)
        if self.task.kind == "code":
            passed = [self._verdict(question, key, journal) == "passed" for key in keys]
            return sum(passed) / len(passed)
        texts = [journal[key]["text"] for key in keys]
        found = majority([self.task.extract(text) for text in texts])
        return float(found == question.gold)

    def facts(
        self, questions: Sequence[TextQuestion], arm: Arm, journal: Journal
    ) -> dict[str, Any]:
        """Return what the answers took, and the share that ran into the limit.

        Tokens are means of a text; `samples` texts answer one question. Those of the
        prompt are `None` where the journal is older than their count.
        """
        outcomes = [
            journal[key] for question in questions for key in self._keys(question, arm)
        ]
        prompts = [each.get("prompt_tokens") for each in outcomes]
        found = {
            "samples": self._vote(arm).samples,
            "mean_prompt_tokens": None if None in prompts else fmean(prompts),
            "mean_tokens": fmean(each["tokens"] for each in outcomes),
            "cut_off": fmean(each["finish"] == "length" for each in outcomes),
        }
        rounds = [each.get("rounds", []) for each in outcomes]
        return {**found, "rounds": summary(rounds)} if any(rounds) else found

    def _missing(
        self, questions: Sequence[TextQuestion], arms: Sequence[Arm], journal: Journal
    ) -> dict[Key, tuple[Arm, TextQuestion]]:
        return {
            key: (arm, question)
            for arm in arms
            for question in questions
            for key in self._keys(question, arm)
            if key not in journal
        }

    def _params(self, arm: Arm, key: Key) -> Any:
        return sampling_params(
            arm,
            max_tokens=self.args.max_tokens,
            temperature=self._vote(arm).temperature,
            stop=list(self.task.stop),
            seed=sample_seed(self.args.seed, key[1], key[2]),
        )

    def _vote(self, arm: Arm) -> Vote:
        return arm.vote or Vote(self.args.samples, self.args.temperature)

    def _keys(self, question: TextQuestion, arm: Arm) -> list[Key]:
        return [(arm.name, question.id, i) for i in range(self._vote(arm).samples)]

    def _verdict(self, question: TextQuestion, key: Key, journal: Journal) -> str:
        if ("run", *key) not in journal:
            program = question.gold.replace(COMPLETION, journal[key]["text"])
            journal.add(("run", *key), run_program(program).verdict)
        return journal[("run", *key)]


def outcome(output: RequestOutput) -> dict[str, Any]:
    """Return what is kept of an answer; JSON types.

    `rounds` are the reports of a request that asked for rounds.
    """
    done = output.outputs[0]
    found = {
        "text": done.text,
        "tokens": len(done.token_ids),
        "finish": done.finish_reason,
        "prompt_tokens": len(output.prompt_token_ids),
    }
    reported = getattr(done, "moe_tta", None)  # engines without rounds set nothing
    return found if reported is None else {**found, "rounds": reported["rounds"]}


def sample_seed(seed: int, question: str, sample: int) -> int:
    """Return a sample's seed: the same for every arm, another for every question."""
    text = f"{seed}/{question}/{sample}"
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
