# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moe_tta.lab import LabError, differences

RANK = 7


@pytest.fixture
def factors():
    rng = np.random.default_rng(0)
    left = rng.integers(-127, 128, (3, 40, RANK), dtype=np.int8)
    right = rng.integers(-127, 128, (3, RANK, 50), dtype=np.int8)
    return left, right, rng.random(3, dtype=np.float32)


def test_product_is_exact(factors):
    left, right, scale = factors
    exact = np.matmul(left.astype(np.int64), right.astype(np.int64))
    expected = exact.astype(np.float32) * scale[:, None, None]
    assert np.array_equal(differences.difference(left, right, scale), expected)


def test_product_does_not_depend_on_the_order_of_summation(factors):
    left, right, scale = factors
    order = np.random.default_rng(1).permutation(RANK)
    shuffled = differences.difference(left[..., order], right[:, order], scale)
    assert np.array_equal(differences.difference(left, right, scale), shuffled)


def test_extreme_factors_stay_exact():
    rank = 1024  # the largest that is allowed
    left = np.full((1, 2, rank), -128, np.int8)
    right = np.full((1, rank, 2), -128, np.int8)
    product = differences.difference(left, right, np.ones(1, np.float32))
    assert (product == rank * 128 * 128).all()


def test_rank_too_large_for_exactness_is_refused():
    factor = np.zeros((1, 2, 1025), np.int8)
    with pytest.raises(LabError, match="rank 1025"):
        differences.difference(factor, factor.swapaxes(1, 2), np.ones(1, np.float32))


def test_shared_factor_equals_repeated_factor(factors):
    left, right, scale = factors
    shared = differences.difference(left[:1], right, scale)
    repeated = differences.difference(left[[0, 0, 0]], right, scale)
    assert np.array_equal(shared, repeated)


@pytest.mark.parametrize("left_experts", [1, 4])
def test_quantisation_error_is_at_most_half_a_step(left_experts):
    torch.manual_seed(0)
    left = torch.randn(2, left_experts, 16, 3)
    right = torch.randn(2, 4, 3, 20)
    parts = differences.quantise(left, right)
    assert parts["left"].dtype == parts["right"].dtype == torch.int8
    assert parts["scale"].shape == (2, 4)
    for name, factor in (("left", left), ("right", right)):
        step = factor.abs().amax((2, 3), keepdim=True) / 127
        error = (parts[name] * step - factor).abs()
        assert (error <= step * 0.5001).all()
    steps = [f.abs().amax((2, 3)) / 127 for f in (left, right)]
    torch.testing.assert_close(parts["scale"], steps[0] * steps[1])


def test_all_zero_factors_quantise_to_zero():
    zero = torch.zeros(1, 2, 4, 3)
    parts = differences.quantise(zero, torch.randn(1, 2, 3, 4))
    product = differences.difference(*(parts[k][0].numpy() for k in parts))
    assert (product == 0).all()


def test_bf16_rounds_to_nearest_even():
    weight = np.array([1 + 2**-8, 1 + 3 * 2**-8], np.float32)  # both halfway
    assert differences.to_bf16(weight).tolist() == [1.0, 1 + 2**-6]


def test_missing_tensor_is_named(tmp_path):
    path = tmp_path / "differences.safetensors"
    save_file({"router": torch.zeros(1)}, path)
    with pytest.raises(LabError, match=r"lacks the tensors .*up\.scale"):
        differences.load(path)
