# SPDX-License-Identifier: Apache-2.0
"""Reading questions, and telling right answers from wrong ones."""

import pytest

from moe_tta.remix.errors import StoreError
from moe_tta.remix.questions import chosen, is_right, normalise, read_questions


def read(tmp_path, *lines):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines), "utf-8")
    return list(read_questions(path))


def test_questions_of_both_kinds(tmp_path):
    one, two = read(
        tmp_path,
        '{"prompt": "P", "choices": ["a", "b"], "gold": 1, "text": "T"}',
        "",
        '{"prompt": "Q", "answers": ["x", "y"]}',
    )
    assert (one.label, one.embedded) == ("b", "T")
    assert (two.label, two.embedded) == ("x", "Q")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Invalid JSON"),
        ('{"prompt": "", "answers": ["x"]}', "prompt"),
        ('{"prompt": "P"}', "either choices or answers"),
        ('{"prompt": "P", "choices": ["a"], "answers": ["a"]}', "either choices or"),
        ('{"prompt": "P", "choices": ["a", "b"]}', "the index of a choice"),
        ('{"prompt": "P", "choices": ["a", "b"], "gold": 2}', "the index of a choice"),
        ('{"prompt": "P", "choices": ["a", "b"], "gold": true}', "gold"),
        ('{"prompt": "P", "answers": ["a"], "gold": 0}', "with choices only"),
        ('{"prompt": "P", "answers": ["a"], "label": 0}', "label"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, words):
    with pytest.raises(StoreError, match=rf"questions.jsonl:2: .*{words}"):
        read(tmp_path, '{"prompt": "Q", "answers": ["x"]}', line)


def test_exact_match_after_normalisation():
    assert normalise(" The  Eiffel-Tower! ") == "eiffeltower"
    assert is_right(" the Paris.\nQuestion: next", ("Rome", "Paris"))
    assert not is_right("Paris is it", ("Paris",))
    assert not is_right("", ("Paris",))


def test_choice_by_log_likelihood():
    assert chosen([-2.0, -3.0], ("a", "bcde"), "raw") == 0
    assert chosen([-2.0, -3.0], ("a", "bcde"), "per_char") == 1
    assert chosen([-1.0, -1.0], ("a", "b"), "raw") == 0
