# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

from benchmarks.quality.statistics import accuracy, compare


def test_accuracy_holds_its_mean():
    found = accuracy(np.array([1.0, 0, 0, 1, 1, 1, 0, 1]))
    assert (found["n"], found["accuracy"]) == (8, 0.625)
    assert 0 <= found["low"] < 0.625 < found["high"] <= 1


def test_interval_of_a_mean_is_about_two_standard_errors():
    right = np.tile([1.0, 0.0], 500)
    found = accuracy(right)
    error = (found["high"] - found["low"]) / 2 / (1.96 * 0.5 / np.sqrt(1000))
    # the bootstrap's own noise: a 97.5 % quantile of 10,000 draws is known to 2.7 %
    assert error == pytest.approx(1, abs=3 * 0.027)


def test_nothing_varies():
    found = accuracy(np.zeros(5))
    assert (found["low"], found["high"]) == (0, 0)
    found = compare(np.ones(5), np.ones(5))
    assert found == {
        "difference": 0,
        "low": 0,
        "high": 0,
        "won": 0,
        "lost": 0,
        "p": 1,
    }


def test_mcnemar_by_hand():
    # six discordant pairs, all won: two-sided p = 2 / 2**6
    right = np.array([1.0] * 6 + [0, 1, 1])
    found = compare(right, np.array([0.0] * 6 + [0, 1, 1]))
    assert (found["won"], found["lost"]) == (6, 0)
    assert found["p"] == pytest.approx(2 / 2**6)
    # five won, one lost: p = 2 (6 choose 0 + 6 choose 1) / 2**6
    other = np.array([0.0] * 5 + [1, 0, 1, 1])
    right = np.array([1.0] * 5 + [0, 0, 1, 1])
    assert compare(right, other)["p"] == pytest.approx(2 * 7 / 2**6)


def test_pairing_narrows_the_interval():
    rng = np.random.default_rng(1)
    reference = rng.integers(0, 2, 400).astype(float)
    right = reference.copy()
    right[:20] = 1 - right[:20]  # 95 % of the answers are the same
    found = compare(right, reference)
    # sd of the differences is at most sqrt(20 / 400); unpaired it would be sqrt(1 / 2)
    assert found["high"] - found["low"] < 2 * 2 * np.sqrt(0.05 / 400)


def test_shares_of_samples_have_no_mcnemar():
    assert "p" not in compare(np.array([0.5, 1.0]), np.array([0.0, 1.0]))


def test_one_question_has_no_interval():
    with pytest.raises(ValueError, match="at least 2 questions, got 1"):
        accuracy(np.ones(1))
