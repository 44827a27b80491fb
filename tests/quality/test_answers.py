# SPDX-License-Identifier: Apache-2.0
import pytest

from benchmarks.quality.answers import final_number, majority, yes_or_no


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 3 + 4 = 7 apples.\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("#### -5", "-5"),
        ("#### 42.\n\nQuestion: 13", "42"),  # what follows is not the answer
        ("#### 18.00", "18"),
        ("#### 0.5", "0.5"),
        ("#### 1\n#### 2", "1"),
        ("So she pays $1,080.50 for 3", "3"),  # no mark: the last number
        ("The answer is $1,000.", "1000"),
        ("it is -3", "-3"),
        ("#### seven", None),
        ("The total is 20.0", "20"),
        ("no number at all", None),
        ("", None),
        (".,", None),
    ],
)
def test_final_number(text, answer):
    assert final_number(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Frogs are green. So the answer is yes.", "yes"),
        ("The answer is no. Or rather, the answer is: Yes", "yes"),
        (" No, since it is too small", "no"),
        ("True", "yes"),
        ("Nobody knows", None),
        ("It is yes", None),
        ("the answer is nothing", None),
        ("", None),
    ],
)
def test_yes_or_no(text, answer):
    assert yes_or_no(text) == answer


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["1", "2", "2"], "2"),
        (["2", "1", "1", "2"], "2"),  # the first of equals
        ([None, None, "3"], "3"),  # texts without an answer abstain
        ([None], None),
    ],
)
def test_majority(answers, winner):
    assert majority(answers) == winner
