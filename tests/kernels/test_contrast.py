# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch

from moe_tta.kernels.contrast import IMPLAUSIBLE, contrast_logits

INF, NAN = math.inf, math.nan


def contrast(strong, weak, beta=0.5, alpha=0.1):
    return contrast_logits(
        torch.tensor([strong]), torch.tensor([weak]), beta, alpha
    ).tolist()[0]


def test_hand_worked():
    # cut = 4 + ln 0.1 = 1.697
    out = contrast([4.0, 2.0, 1.0], [2.0, 3.0, 0.0])
    assert out == [1.5 * 4 - 0.5 * 2, 1.5 * 2 - 0.5 * 3, 1 - IMPLAUSIBLE]


def test_cut_itself_is_plausible():
    just_below = 1.0 - 2**-20
    out = contrast([1.0, just_below], [1.0, 1.0], alpha=1.0)
    assert out == [1.0, torch.tensor(just_below).sub(IMPLAUSIBLE).item()]
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
    assert out.tolist() == [[3.0, 2.0], [4.0, 2.0], [4.0, 2.0 - IMPLAUSIBLE]]


def test_alpha_zero_keeps_every_token():
    assert contrast([3.0, -50.0], [1.0, -50.0], alpha=0.0) == [4.0, -50.0]


def test_implausible_tokens_have_no_chance_but_an_order():
    """A later mask of every plausible token must not leave all at -inf."""
    row = torch.tensor(contrast([9.0, 1.0, 2.0, -INF], [0.0] * 4))
    probabilities = row.softmax(0)
    assert probabilities.tolist() == [1.0, 0.0, 0.0, 0.0]
    row[0] = -INF
    assert row.argmax() == 2
    assert torch.allclose(
        row.softmax(0),
        torch.tensor([-INF, 1.0, 2.0, -INF]).softmax(0),
        atol=IMPLAUSIBLE * torch.finfo(torch.float32).eps,
    )


def test_half_precision_is_widened():
    rows = torch.randn(2, 2, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    out = contrast_logits(rows[0], rows[1], 0.3, 0.01)
    assert torch.equal(out, contrast_logits(*rows.float(), 0.3, 0.01))
    assert out.dtype == torch.float32


def test_empty_batch():
    empty = torch.zeros(0, 8)
    assert contrast_logits(empty, empty, 0.5, 0.1).shape == (0, 8)
