# SPDX-License-Identifier: Apache-2.0
"""Kernels on numbers worked out by hand."""

import math

import numpy as np
import pytest

from moe_tta.remix.weights import KERNELS, distance, weigh

# cosines 1, 0.5, 0 and -1 are distances 0, 1, sqrt 2 and 2
COSINES = np.array([1.0, 0.5, 0.0, -1.0])
ONES = np.ones(4)


def test_distance_of_unit_vectors():
    np.testing.assert_allclose(distance(COSINES), [0, 1, math.sqrt(2), 2], rtol=1e-15)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 5, 7))
    a /= np.linalg.norm(a, axis=1, keepdims=True)
    b /= np.linalg.norm(b, axis=1, keepdims=True)
    apart = np.linalg.norm(a - b, axis=1)
    np.testing.assert_allclose(distance((a * b).sum(axis=1)), apart, rtol=1e-12)


def test_gaussian():
    # d^2 = 0, 1, 2, 4 and 2 h^2 = 2
    want = [1, math.exp(-0.5), math.exp(-1), math.exp(-2)]
    np.testing.assert_allclose(weigh("gaussian", COSINES, ONES, 1.0), want, rtol=1e-14)


def test_matern():
    # a = sqrt(3) d / h with h = sqrt 3 is d itself
    a = np.array([0, 1, math.sqrt(2), 2])
    got = weigh("matern", COSINES, ONES, math.sqrt(3))
    np.testing.assert_allclose(got, (1 + a) * np.exp(-a), rtol=1e-14)


def test_products():
    norms = np.array([1.0, 4.0, 1.0, 1.0])
    assert weigh("cosine", COSINES, norms).tolist() == [1, 0.5, 0, 0]
    assert weigh("linear", COSINES, norms).tolist() == [1, 2, 0, 0]
    assert weigh("polynomial", COSINES, norms).tolist() == [8, 1.5**3, 1, 0]


@pytest.mark.parametrize("kernel", ["gaussian", "matern"])
def test_the_default_width_is_the_median_distance(kernel):
    cosines = np.array([0.9, 0.5, 0.2])
    got = weigh(kernel, cosines, np.ones(3))
    want = weigh(kernel, cosines, np.ones(3), distance(0.5).item())
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("kernel", ["gaussian", "matern"])
def test_limits(kernel):
    # most neighbours are the query itself: they alone count
    assert weigh(kernel, [1.0, 1.0, 0.9], np.ones(3)).tolist() == [1, 1, 0]
    # so narrow that every value underflows: the nearest is left, not 0 / 0
    assert weigh(kernel, [0.5, 0.4], np.ones(2), 1e-4).tolist() == [1, 0]
    # so wide that all count alike
    np.testing.assert_allclose(weigh(kernel, COSINES, ONES, 1e6), ONES, rtol=1e-11)


@pytest.mark.parametrize("kernel", KERNELS)
def test_nearer_never_counts_less(kernel):
    falling = np.linspace(1, -1, 21)
    values = weigh(kernel, falling, np.ones(21))
    assert (np.diff(values) <= 0).all()
    assert (values >= 0).all()
    assert values[0] > 0
