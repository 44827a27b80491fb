# SPDX-License-Identifier: Apache-2.0
"""Updates on numbers worked out by hand, and their identities."""

import math

import numpy as np
import pytest

from moe_tta.remix.updates import (
    Borrowed,
    blend,
    confidence,
    mean_shift,
    nearest_pathways,
    regress,
)

# one layer, two experts
A, B = [[1.0, 0.0]], [[0.0, 1.0]]


def borrowed(weights, pathways):
    count = len(weights)
    return Borrowed(
        np.arange(count), np.ones(count), np.array(weights), np.array(pathways)
    )


def test_regression_by_hand():
    assert regress(borrowed([3.0, 1.0], [A, B])).tolist() == [[0.75, 0.25]]


def test_one_neighbour_is_returned_to_the_bit():
    rng = np.random.default_rng(0)
    pathways = rng.dirichlet(np.ones(64), (1, 16)).astype(np.float32)
    for weight in (1.0, 0.3, 7.1):
        got = regress(borrowed([weight], pathways)).astype(np.float32)
        np.testing.assert_array_equal(got, pathways[0])


def test_regression_stays_on_the_simplex():
    rng = np.random.default_rng(1)
    mean = regress(borrowed(rng.random(5), rng.dirichlet(np.ones(9), (5, 3))))
    np.testing.assert_allclose(mean.sum(axis=1), 1, rtol=1e-14)
    assert (mean >= 0).all()


def test_blend_and_confidence():
    assert blend(np.array(A), np.array(B), 0.25).tolist() == [[0.25, 0.75]]
    assert confidence(np.array([0.25, 0.75])) == 0.5
    assert confidence(np.array([-0.5, 0.1])) == 0
    assert confidence(np.array([1.5, 1.5])) == 1


def test_mean_shift_by_hand():
    # from A with h = 1: distance 0 to A, sqrt 2 to B; weights 1 and exp(-1)
    far = math.exp(-1)
    want = np.array([[1 / (1 + far), far / (1 + far)]])
    got = mean_shift(A, [A, B], bandwidth=1.0)
    np.testing.assert_allclose(got, want, rtol=1e-14)
    half = mean_shift(A, [A, B], bandwidth=1.0, alpha=0.5)
    np.testing.assert_allclose(half, (np.array(A) + want) / 2, rtol=1e-14)


def test_mean_shift_steps_are_single_steps():
    rng = np.random.default_rng(2)
    own, *references = rng.dirichlet(np.ones(5), (8, 3))
    once = mean_shift(own, references, alpha=0.3)
    twice = mean_shift(once, references, alpha=0.3)
    got = mean_shift(own, references, alpha=0.3, steps=2)
    np.testing.assert_array_equal(got, twice)
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=1e-13)


def test_mean_shift_finds_the_mode_it_is_near():
    rng = np.random.default_rng(3)
    left = rng.dirichlet([400, 100, 1], (20, 2))
    right = rng.dirichlet([1, 100, 400], (20, 2))
    both = np.concatenate([left, right])
    found = mean_shift(left[0], both, bandwidth=0.1, steps=20)
    np.testing.assert_allclose(found, left.mean(axis=0), atol=0.02)
    again = mean_shift(found, both, bandwidth=0.1)
    np.testing.assert_allclose(again, found, atol=1e-6)


def test_alpha_one_changes_nothing():
    rng = np.random.default_rng(4)
    own, *references = rng.dirichlet(np.ones(5), (4, 3))
    np.testing.assert_array_equal(mean_shift(own, references, alpha=1.0, steps=3), own)


def test_nearest_pathways():
    middle = [[0.5, 0.5]]
    assert nearest_pathways(A, [B, middle, A, A], 3).tolist() == [2, 3, 1]


def test_a_kernel_without_width_is_no_kernel_of_pathways():
    with pytest.raises(KeyError):
        mean_shift(A, [A], kernel="cosine")
