# SPDX-License-Identifier: Apache-2.0
"""Which references go with which task, and which task has none."""

import pytest

from benchmarks.quality.__main__ import main, parser
from benchmarks.quality.remix.references import open_references
from benchmarks.quality.tasks import TASKS
from tests.quality.conftest import byte_model as byte_model
from tests.quality.test_remix import command
from tests.quality.test_remix import data as data
from tests.quality.test_remix import study as study


@pytest.mark.parametrize(
    ("task", "words"),
    [("mmlu", ("boolq", "copa")), ("sciq", ("arc_easy", "openbookqa"))],
)
def test_references_of_the_other_tasks(byte_model, data, study, tmp_path, task, words):
    """BoolQ keeps its passage, which its question is about."""
    args = command(byte_model, data, tmp_path, tmp_path / "out")[1:]
    args = parser().parse_args([*args, "--task", task])
    rest = study.model, study.tokenizer
    store = open_references(args, TASKS[task], *rest)
    assert store.card.counts.questions == 32
    texts = [store.question(row).prompt for row in range(len(store))]
    assert len(texts) >= 4
    assert all(any(word in text for word in words) for text in texts)
    passages = [text.startswith("A passage.") for text in texts]
    assert passages == ["boolq" in text for text in texts]


def test_a_task_with_a_prompt_for_each_choice_is_refused(
    byte_model, data, tmp_path, monkeypatch, capsys
):
    words = command(byte_model, data, tmp_path, tmp_path / "out")
    monkeypatch.setattr("sys.argv", [*words, "--task", "winogrande"])
    assert main() == 1
    assert "share no last prompt token" in capsys.readouterr().err
