# SPDX-License-Identifier: Apache-2.0
import math

import numpy as np
import pytest

from moe_tta.diagnostics import (
    gaussian_kernel,
    kernel_regression,
    npmi,
    risk_difference,
    segment_routing_f1,
)


def test_npmi_hand_worked():
    # log2(2/4) + log2(64/8) = 2; log2(64/2) = 5
    assert npmi(2, 4, 8, 64) == pytest.approx(0.4)
    assert npmi(0, 4, 8, 64) == -1.0
    assert npmi(64, 64, 64, 64) == 0.0  # an expert that is always on tells nothing
    assert npmi(4, 4, 64, 64) == 0.0


def test_npmi_takes_arrays():
    joint = np.array([[0, 2], [4, 1]])
    scores = npmi(joint, 4, 8, 64)
    assert scores.shape == (2, 2)
    assert (np.argsort(scores.ravel()) == np.argsort(joint.ravel())).all()
    assert ((scores >= -1) & (scores <= 1)).all()


@pytest.mark.parametrize(
    "counts", [(5, 4, 8, 64), (5, 8, 4, 64), (2, 65, 8, 64), (2, 4, 65, 64), (-1,) * 4]
)
def test_npmi_refuses_impossible_counts(counts):
    with pytest.raises(ValueError, match="counts must satisfy"):
        npmi(*counts)


def test_risk_difference_hand_worked():
    d = risk_difference([[3, 0]], 4, [[1, 5]], 10)
    np.testing.assert_allclose(d, [[0.65, -0.5]], rtol=1e-15)
    with pytest.raises(ValueError, match="both classes need tokens, got 0 and 3"):
        risk_difference([[0]], 0, [[0]], 3)


def test_segment_routing_f1_hand_worked():
    # disjoint windows of 2 hold 2, 1, 0: a = 2 gives hit 2, predicted 2, true 3 and
    # F1 = 4/5; a = 1 gives 3, 4, 3 and F1 = 6/7
    assert segment_routing_f1([1, 1, 0, 1, 0, 0], 2, 2) == (6 / 7, 4 / 3)
    # all windows: 2, 1, 1, 1
    assert segment_routing_f1([1, 1, 0, 1, 0], 2) == (10 / 13, 8 / 5)


def test_segment_routing_f1_of_always_never_and_short():
    assert segment_routing_f1(np.ones(9), 4) == (1.0, 1.0)
    assert segment_routing_f1(np.zeros(9), 4) == (0.0, 0.0)
    with pytest.raises(ValueError, match="3 tokens do not fill a window of 4"):
        segment_routing_f1(np.ones(3), 4)


def test_segment_routing_f1_shares_one_threshold_over_experts():
    one, other = np.array([1, 1, 1, 1, 0, 0, 0, 0]), np.array([1, 0, 0, 0] * 2)
    # both experts, windows of 4: 4, 0 and 1, 1; a = 4: 2 * 4 / (4 + 6)
    assert segment_routing_f1(np.stack([one, other], 1), 4, 4) == (0.8, 4 / 6)


def test_gaussian_kernel():
    values = gaussian_kernel([1.0, 0.0], [[1, 0], [0, 1]], sigma=0.5)
    np.testing.assert_allclose(values, [1.0, math.exp(-4)], rtol=1e-15)


def test_kernel_regression():
    pathways = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    np.testing.assert_array_equal(kernel_regression([3, 1], pathways), [[0.75, 0.25]])
    for weights in ([0, 0], [1, -1], [2, -1]):
        with pytest.raises(ValueError, match="kernel values must be >= 0"):
            kernel_regression(weights, pathways)
