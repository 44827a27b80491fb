# SPDX-License-Identifier: Apache-2.0
import pytest

from benchmarks.quality.journal import Journal


def test_a_killed_run_goes_on(tmp_path):
    path = tmp_path / "new" / "run.jsonl"
    first = Journal(path, {"seed": 0})
    first.add(("greedy", "q1", 0), {"text": "a"})
    first.add(("greedy", "q2", 0), {"text": "b\nc"})
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])  # killed while it wrote the last line
    again = Journal(path, {"seed": 0})
    assert ("greedy", "q1", 0) in again
    assert ("greedy", "q2", 0) not in again
    again.add(("greedy", "q2", 0), {"text": "b\nc"})
    assert path.read_bytes() == whole
    assert Journal(path, {"seed": 0})[("greedy", "q2", 0)] == {"text": "b\nc"}


def test_a_kill_during_the_first_line(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"se')
    Journal(path, {"seed": 0}).add(("a",), 1)
    assert Journal(path, {"seed": 0})[("a",)] == 1


def test_another_run_s_outcomes_are_not_mixed_in(tmp_path):
    Journal(tmp_path / "run.jsonl", {"seed": 0, "dtype": "bfloat16"})
    with pytest.raises(ValueError, match=r"of another run: seed differ"):
        Journal(tmp_path / "run.jsonl", {"seed": 1, "dtype": "bfloat16"})


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "run.jsonl"
    path.write_text('{"seed": 0}\n["a", 1\n["b", 1]\n')
    with pytest.raises(ValueError):
        Journal(path, {"seed": 0})
