# SPDX-License-Identifier: Apache-2.0
"""What is reported of rounds and of compute, by hand."""

import pytest

from benchmarks.quality.compute import compute_table
from benchmarks.quality.round_plot import losses_of_rounds
from benchmarks.quality.rounds import summary


def report(number, losses, context=10, outcome="adapted", milliseconds=2.0):
    found = {"round": number, "context": context, "outcome": outcome}
    return {**found, "losses": losses, "milliseconds": milliseconds}


FAILED = {"round": 1, "context": 18, "outcome": "failed", "milliseconds": 1.0}
ANSWERS = [
    [report(0, [3.0, 2.5, 2.0]), report(1, [2.0, 2.5, 2.5], context=18)],
    [report(0, [1.0, 1.0, 1.0]), FAILED],
    [report(0, [], context=1, outcome="no token to score")],
    [],
]


def test_rounds_are_summed_up():
    assert summary(ANSWERS) == {
        "texts": 4,
        "adapted": 2,
        "outcomes": {"adapted": 3, "failed": 1, "no token to score": 1},
        "token_steps": (2 * 10 + 2 * 18 + 2 * 10) / 4,
        "milliseconds": 9 / 4,
        "rounds": 3,
        "fallen": 1 / 3,
        "before": 2.0,
        "after": pytest.approx(5.5 / 3),
        "by_round": [
            {"round": 0, "rounds": 2, "fallen": 0.5, "before": 2.0, "after": 1.5},
            {"round": 1, "rounds": 1, "fallen": 0.0, "before": 2.0, "after": 2.5},
        ],
        "losses": [[0, 3.0, 2.0], [1, 2.0, 2.5], [0, 1.0, 1.0]],
    }


def test_rounds_that_all_failed():
    found = summary([[report(0, [], outcome="out of memory")]])
    assert (found["rounds"], found["fallen"], found["by_round"]) == (0, None, [])


def result_of(*rounds):
    """Arms of two samples a question, one for each summary of rounds and `None`."""
    arm = {"n": 2, "accuracy": 0.5, "samples": 2, "mean_prompt_tokens": 10.0}
    arm |= {"mean_tokens": 3.5, "cut_off": 0.25}
    arms = [
        {"name": str(place), **arm, **({} if found is None else {"rounds": found})}
        for place, found in enumerate(rounds)
    ]
    return {"task": "gsm8k", "test": {"arms": arms}}


def test_compute_is_that_of_a_question():
    alone = summary([[report(0, [], outcome="out of memory")]])
    lines = compute_table([result_of(None, summary(ANSWERS), alone)])
    assert lines[2:] == [
        "| gsm8k | 0 | 2 | 0.500 | 20.0 | 7.0 | 0.25 |  |  |  |  |  |",
        "| gsm8k | 1 | 2 | 0.500 | 20.0 | 7.0 | 0.25 | 2.50 | 38 | 4 | 33.3 % of 3 "
        "| 2.0000, 1.8333 |",
        "| gsm8k | 2 | 2 | 0.500 | 20.0 | 7.0 | 0.25 | 2.00 | 0 | 4 |  |  |",
    ]
    unknown = result_of(None)
    unknown["test"]["arms"][0]["mean_prompt_tokens"] = None
    assert compute_table([unknown])[2].startswith("| gsm8k | 0 | 2 | 0.500 |  | 7.0 |")
    del unknown["test"]["arms"][0]["samples"]
    with pytest.raises(ValueError, match="the result of gsm8k has no compute"):
        compute_table([unknown])


def test_a_panel_for_each_arm_with_rounds():
    (panel,) = losses_of_rounds([result_of(None, summary(ANSWERS))]).axes
    assert panel.get_title() == "gsm8k\n1"
    first, later = panel.collections
    assert first.get_offsets().tolist() == [[3.0, -1.0], [1.0, 0.0]]
    assert later.get_offsets().tolist() == [[2.0, 0.5]]
    with pytest.raises(ValueError, match="no arm of these results had rounds"):
        losses_of_rounds([result_of(None)])
