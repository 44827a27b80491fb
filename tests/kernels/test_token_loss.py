# SPDX-License-Identifier: Apache-2.0
"""The tokens' loss in plain torch."""

import math

import torch
from torch.nn import functional

from moe_tta.kernels.token_loss import score_rows


def test_by_hand():
    """Logits 0 and ln 3: shares 1/4 and 3/4."""
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    nll, before = torch.empty(2), logits.clone()
    score_rows(logits, torch.tensor([0, 1]), nll, False)
    want = torch.tensor([math.log(4), math.log(4 / 3)])
    torch.testing.assert_close(nll, want, rtol=1e-6, atol=0)
    assert torch.equal(logits, before)
    score_rows(logits, torch.tensor([0, 1]), nll, True)
    slopes = torch.tensor([[-0.75, 0.75], [0.25, -0.25]])
    torch.testing.assert_close(logits, slopes, rtol=1e-6, atol=0)


def test_slopes_are_autograds():
    generator = torch.Generator().manual_seed(7)
    logits = 9 * torch.randn(6, 50, generator=generator, dtype=torch.float64)
    targets = torch.tensor([0, 49, 3, 3, 17, 20])
    leaf = logits.clone().requires_grad_()
    values = functional.cross_entropy(leaf, targets, reduction="none")
    (want,) = torch.autograd.grad(values.sum(), leaf)
    nll = torch.empty(6, dtype=torch.float64)
    score_rows(logits, targets, nll, True)
    torch.testing.assert_close(nll, values.detach(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(logits, want, rtol=1e-14, atol=1e-14)
