# SPDX-License-Identifier: Apache-2.0
"""The kernel of the tokens' loss against float64; `test_triton.py` runs this."""

import math

import pytest
import torch
from torch.nn import functional

from moe_tta.kernels.token_loss_triton import _BLOCK, score_rows
from tests.kernels.rope_bounds import UNIT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off where hardware rounds
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
LARGE = [50304, 151936] if DEVICE == "cuda" else []
VOCABS = [1, 2, 7, 1000, _BLOCK - 1, _BLOCK, _BLOCK + 1, 2 * _BLOCK + 8, *LARGE]


def draw(num_rows, vocab, dtype):
    """Return logits in a buffer of NaN with longer rows, that buffer, and targets."""
    generator = torch.Generator().manual_seed(vocab)
    pitch = -(-vocab // 8) * 8 + 8
    buffer = torch.full((num_rows, pitch), math.nan, dtype=dtype)
    spread = torch.tensor([1.0, 5.0, 30.0, 0.0])[torch.arange(num_rows) % 4]
    rows = torch.randn(num_rows, vocab, generator=generator) * spread[:, None]
    rows[1] += 20000.0  # far from 0: only differences count
    buffer[:, :vocab] = rows.to(dtype)
    targets = torch.randint(0, vocab, (num_rows,), generator=generator)
    targets[0], targets[1] = 0, vocab - 1
    buffer = buffer.to(DEVICE)
    return buffer[:, :vocab], buffer, targets.to(DEVICE)


def exact(logits, targets):
    """Return values and slopes in float64, by autograd."""
    leaf = logits.double().requires_grad_()
    nll = functional.cross_entropy(leaf, targets, reduction="none")
    (slopes,) = torch.autograd.grad(nll.sum(), leaf)
    return nll.detach(), slopes


def check(logits, targets, slopes):
    """Bounds: a GPU's exp errs by 2^-22 and by its argument's roundings.

    A term of the sum is exp of a difference d from the maximum. The difference, log2 e
    and their product are rounded: it is off by 2^-22 + 3 2^-24 |d|, and lanes pass it
    on in at most V / block further factors of as much. The sum adds V / block roundings
    in a lane and 12 in the tree across them. The value then has a logarithm and a
    difference to round, a slope a quotient.
    """
    nll, wanted = exact(logits, targets)
    span = float(logits.double().amax(1).sub(logits.double().amin(1)).max())
    factors = logits.shape[1] // _BLOCK + 3
    share = factors * (2**-22 + 3 * 2**-24 * span) + 2**-24 * (factors + 12)
    found = torch.full_like(nll, math.nan, dtype=torch.float32)
    before = logits.clone()
    score_rows(logits, targets, found, slopes)
    assert ((found - nll).abs() <= share + 2**-22 * (1 + nll.abs())).all()
    if not slopes:
        assert torch.equal(logits, before)
        return
    shares = wanted.clone().scatter_add_(
        1, targets[:, None], torch.ones_like(wanted[:, :1])
    )
    bound = share * shares + UNIT[torch.float32]
    if logits.dtype != torch.float32:
        bound += UNIT[logits.dtype] * wanted.abs() + 2.0**-25
    assert ((logits - wanted).abs() <= bound).all()


@pytest.mark.parametrize("slopes", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
def test_within_what_float32_may_err(vocab, dtype, slopes):
    logits, buffer, targets = draw(5, vocab, dtype)
    check(logits, targets, slopes)
    assert buffer[:, vocab:].isnan().all()


def test_by_hand():
    """Logits 0 and ln 3: shares 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]] * 2, device=DEVICE)
    nll = torch.empty(2, device=DEVICE)
    score_rows(logits, torch.tensor([0, 1], device=DEVICE), nll, True)
    want = torch.tensor([math.log(4), math.log(4 / 3)])
    torch.testing.assert_close(nll.cpu(), want, rtol=2**-20, atol=0)
    slopes = torch.tensor([[-0.75, 0.75], [0.25, -0.25]])
    torch.testing.assert_close(logits.cpu(), slopes, rtol=2**-20, atol=0)


def test_the_same_every_time():
    logits, _, targets = draw(4, 2 * _BLOCK + 8, HALF)
    made = []
    for _ in range(2):
        nll, again = torch.empty(4, device=DEVICE), logits.clone()
        score_rows(again, targets, nll, True)
        made.append((nll, again))
    assert all(torch.equal(a, b) for a, b in zip(*made, strict=True))


def test_what_is_not_finite():
    """As torch: an infinite or NaN logit spoils its own row, -inf is a share of 0."""
    rows = torch.zeros(5, 40)
    rows[0, 3], rows[1, 3], rows[2, 3] = math.nan, math.inf, -math.inf
    rows[3] = -math.inf
    targets = torch.tensor([0, 0, 0, 0, 3])
    want = functional.cross_entropy(rows, targets, reduction="none")
    nll = torch.empty(5, device=DEVICE)
    logits = rows.to(DEVICE)
    score_rows(logits, targets.to(DEVICE), nll, True)
    torch.testing.assert_close(nll.cpu(), want, rtol=2**-20, atol=0, equal_nan=True)
    assert logits[2, 3] == 0
    assert logits[4].isfinite().all()


def test_no_rows():
    none = torch.empty(0, device=DEVICE)
    score_rows(none.view(0, 9), none.long(), none, True)
