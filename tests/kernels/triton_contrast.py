# SPDX-License-Identifier: Apache-2.0
"""The contrast kernel against the law; `test_triton.py` runs this."""

import math

import pytest
import torch

from moe_tta.kernels.contrast import contrast_logits
from moe_tta.kernels.contrast_triton import BLOCK_SIZE, contrast_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
VOCABS = [1, 7, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 3 * BLOCK_SIZE + 5]
# the GPU may fuse the product and the sum: one rounding less, of values up to 100
TOLERANCE = 0.0 if DEVICE == "cpu" else 100 * torch.finfo(torch.float32).eps


def draw(num_rows, vocab, seed):
    """Return logits with masked tokens, NaN and infinities, in a wider buffer."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((num_rows, vocab + 3), math.nan)
    buffer[:, :vocab] = torch.randn(num_rows, vocab, generator=generator) * 5
    odd = torch.rand(num_rows, vocab, generator=generator)
    rows = buffer[:, :vocab]
    rows[odd < 0.1] = -math.inf
    rows[odd > 0.97] = math.nan
    return buffer.to(DEVICE)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("pairs", [0, 1, 5])
def test_kernel_equals_the_law(vocab, pairs):
    buffer = draw(2 * pairs + 3, vocab, seed=vocab + pairs)
    logits = buffer[:, :vocab]
    order = torch.randperm(2 * pairs + 3, generator=torch.Generator().manual_seed(1))
    leads, followers = order[:pairs].to(DEVICE), order[pairs : 2 * pairs].to(DEVICE)
    beta = torch.tensor([0.0, 0.3, 0.5, 2.0, 10.0])[:pairs].to(DEVICE)
    alpha = torch.tensor([0.1, 0.0, 1.0, 0.5, 1e-30])[:pairs].to(DEVICE)
    want = buffer.clone()
    if pairs:
        want[leads, :vocab] = contrast_logits(
            logits[leads], logits[followers], beta, alpha
        )
    contrast_rows(logits, leads, followers, beta, alpha)
    torch.testing.assert_close(buffer, want, rtol=0, atol=TOLERANCE, equal_nan=True)


@pytest.mark.parametrize(
    ("strong", "weak"),
    [
        ([3.0, -math.inf], [1.0, 2.0]),
        ([-math.inf, -math.inf], [1.0, 1.0]),
        ([math.inf, 2.0], [1.0, 1.0]),
        ([math.nan, math.nan], [1.0, 1.0]),
        ([3.0, 2.5], [math.nan, math.inf]),
        ([3.0, 2.5], [-math.inf, -math.inf]),
    ],
)
def test_rows_without_a_number_to_hold_on_to(strong, weak):
    logits = torch.tensor([weak, strong], device=DEVICE)
    one = torch.tensor([0.5], device=DEVICE)
    want = contrast_logits(logits[1:], logits[:1], one, one)
    rows = torch.tensor([1], device=DEVICE), torch.tensor([0], device=DEVICE)
    contrast_rows(logits, *rows, one, one)
    assert torch.equal(logits[1:].nan_to_num(7), want.nan_to_num(7))


def test_equal_rows_and_beta_zero_are_the_strong_row():
    logits = draw(4, 50, seed=0)[:, :50].nan_to_num(1.0)
    logits[1] = logits[0]
    before = logits.clone()
    rows = torch.tensor([0, 2], device=DEVICE), torch.tensor([1, 3], device=DEVICE)
    beta = torch.tensor([2.0, 0.0], device=DEVICE)
    contrast_rows(logits, *rows, beta, torch.zeros(2, device=DEVICE))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"logits": torch.zeros(4, 8).bfloat16()}, "expected float32 logits"),
        ({"logits": torch.zeros(8, 4).T}, "stride 1 along V"),
        ({"leads": torch.zeros(2, dtype=torch.int32)}, r"expected torch.int64 \[2\]"),
        ({"beta": torch.zeros(3)}, r"expected torch.float32 \[2\]"),
    ],
)
def test_wrong_inputs_are_named(change, words):
    given = {
        "logits": torch.zeros(4, 8),
        "leads": torch.tensor([0, 1]),
        "followers": torch.tensor([2, 3]),
        "beta": torch.ones(2),
        "alpha": torch.ones(2),
    }
    with pytest.raises(ValueError, match=words):
        contrast_rows(**{**given, **change})
