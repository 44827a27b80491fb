# SPDX-License-Identifier: Apache-2.0
"""docs/quality.md says what the committed result files say."""

from benchmarks.quality.options import RESULTS
from benchmarks.quality.report import read_results, table
from benchmarks.quality.tasks import TASKS
from tests.docs.blocks import ROOT

PAGE = (ROOT / "docs" / "quality.md").read_text("utf-8")
FILES = sorted((ROOT / RESULTS).glob("*.json"))


def test_every_result_is_in_the_tables():
    assert FILES
    for line in table(read_results(FILES)):
        assert line in PAGE


def test_every_task_and_its_parts_are_documented():
    for name in TASKS:
        assert f"`{name}`" in PAGE


def test_results_name_no_machine():
    for file in FILES:
        text = file.read_text("utf-8")
        assert '"/' not in text, file.name
        assert "-dirty" not in text, file.name
