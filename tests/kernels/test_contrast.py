# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from moe_tta.kernels.contrast import contrast_logits

INF, NAN = math.inf, math.nan


def contrast(strong, weak, beta=0.5, alpha=0.1):
    return contrast_logits(
        torch.tensor([strong]), torch.tensor([weak]), beta, alpha
    ).tolist()[0]


def test_hand_worked():
    # cut = 4 + ln 0.1 = 1.697
    out = contrast([4.0, 2.0, 1.0], [2.0, 3.0, 0.0])
    assert out == [1.5 * 4 - 0.5 * 2, 1.5 * 2 - 0.5 * 3, -INF]


def test_cut_itself_is_plausible():
    assert contrast([1.0, 1.0 - 2**-20], [1.0, 1.0], alpha=1.0) == [1.0, -INF]
    assert contrast([1.0, 1.0], [1.0, 0.0], alpha=1.0) == [1.0, 1.5]


@pytest.mark.parametrize(
    ("strong", "weak", "want"),
    [
        ([3.0, -INF], [1.0, 2.0], [4.0, -INF]),  # masked in the strong row
        ([3.0, 2.5], [1.0, -INF], [4.0, 2.5]),  # masked in the weak row alone
        ([3.0, -INF], [1.0, -INF], [4.0, -INF]),  # a grammar masks both
        ([3.0, 2.5], [NAN, 2.5], [3.0, 2.5]),
        ([3.0, NAN], [1.0, 1.0], [4.0, -INF]),
        ([-INF, -INF], [1.0, 1.0], [-INF, -INF]),
    ],
)
def test_masked_and_missing_values(strong, weak, want):
    assert contrast(strong, weak) == want


def test_rows_have_their_own_strength():
    strong = torch.tensor([[3.0, 2.0]] * 3)
    weak = torch.tensor([[1.0, 2.0]] * 3)
    out = contrast_logits(
        strong, weak, torch.tensor([0.0, 0.5, 0.5]), torch.tensor([0.1, 0.1, 0.9])
    )
    assert out.tolist() == [[3.0, 2.0], [4.0, 2.0], [4.0, -INF]]


def test_half_precision_is_widened():
    rows = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = contrast_logits(rows[0], rows[1], 0.3, 0.01)
    assert torch.equal(out, contrast_logits(*rows.float(), 0.3, 0.01))
    assert out.dtype == torch.float32


def test_empty_batch():
    empty = torch.zeros(0, 8)
    assert contrast_logits(empty, empty, 0.5, 0.1).shape == (0, 8)
