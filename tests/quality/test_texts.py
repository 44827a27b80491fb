# SPDX-License-Identifier: Apache-2.0
"""Judging texts that are already there: no engine is asked."""

from argparse import Namespace

import pytest

from benchmarks.quality.arms import PLAIN
from benchmarks.quality.journal import Journal
from benchmarks.quality.sandbox import SandboxError, run_program
from benchmarks.quality.tasks import TASKS
from benchmarks.quality.tasks.question import TextQuestion
from benchmarks.quality.texts import TextJudge


def judge(task, samples):
    return TextJudge(None, TASKS[task], Namespace(samples=samples, temperature=1.0))


def journal(path, texts):
    found = Journal(path / "run.jsonl", {})
    for sample, text in enumerate(texts):
        found.add(("plain", "q", sample), {"text": text})
    return found


@pytest.mark.parametrize(
    ("texts", "right"),
    [
        (["#### 5", "#### 7", "#### 7"], 1.0),
        (["#### 5", "#### 5", "#### 7"], 0.0),
        (["nothing", "none", "so 7"], 1.0),
        (["?", "?", "?"], 0.0),
    ],
)
def test_the_majority_answers(tmp_path, texts, right):
    outcomes = journal(tmp_path, texts)
    question = TextQuestion("q", "", "7")
    assert judge("gsm8k", 3).right(question, PLAIN, outcomes) == right


def test_programs_are_run_once_and_the_share_that_passes_counts(tmp_path):
    try:
        run_program("pass", timeout_s=60.0)
    except SandboxError as err:
        pytest.skip(str(err))
    texts = ["    return x + 1", "    return x", "    return 1 +", "    return 1 + x"]
    size = len(texts)
    outcomes = journal(tmp_path, texts)
    question = TextQuestion("q", "", "def f(x):\n{completion}\nassert f(1) == 2\n")
    judging = judge("humaneval", 4)
    judging.answer([question], [PLAIN], outcomes)
    assert len(outcomes.outcomes) == size  # nothing is run yet
    assert judging.right(question, PLAIN, outcomes) == 0.5
    assert len(outcomes.outcomes) == 2 * size
    assert outcomes[("run", "plain", "q", 2)] == "failed"
    # verdicts are not found again, but read
    outcomes.outcomes[("run", "plain", "q", 2)] = "passed"
    assert judging.right(question, PLAIN, outcomes) == 0.75
