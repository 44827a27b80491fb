# SPDX-License-Identifier: Apache-2.0
"""Choices of layers, steps and estimates, by hand and on functions of known slope."""

import math

import torch

from moe_tta.adapter.choice import hard_choice, named_choice, soft_choice
from moe_tta.adapter.descent import autograd_gradient, descend
from moe_tta.adapter.spsa import spsa_gradient


def test_choices_by_hand():
    uncertainty = torch.tensor([[0.5, 2.0, 1.0, 2.0]])
    high = hard_choice(uncertainty, 0.5, 1)
    assert high.tolist() == [[False, True, False, True]]
    assert hard_choice(uncertainty, 0.5, -1).tolist() == [[True, False, True, False]]
    assert hard_choice(uncertainty, 0.01, 1).sum() == 1
    assert hard_choice(uncertainty, 1.0, -1).all()
    soft = soft_choice(torch.tensor([[0.0, math.log(3.0)]]), 1)
    torch.testing.assert_close(soft, torch.tensor([[0.5, 1.5]]))
    named = named_choice((2, 3), [1], torch.device("cpu"))
    assert named.tolist() == [[False, True, False]] * 2


def test_adam_is_torchs_and_makes_no_steps_of_rounding():
    slopes = torch.tensor([[[0.3, -1e-3, 1e-8, 0.0]]])

    def gradient(delta):
        return torch.zeros(1), slopes

    def loss(delta):
        return torch.zeros(1)

    start, rates = torch.zeros(1, 1, 4), torch.ones(1, 1)
    done = descend(gradient, loss, start, rates, "adam", lr=0.05, steps=3, clip=9.0)
    wanted = torch.zeros(1, 1, 4)
    rule = torch.optim.Adam([wanted], lr=0.05, eps=1e-5)
    for _ in range(3):
        wanted.grad = slopes
        rule.step()
    assert torch.equal(done.delta, wanted)
    assert float(done.delta[0, 0, 1]) > 0.1
    assert abs(float(done.delta[0, 0, 2])) < 3 * 0.05 * 1e-8 / 1e-5
    assert done.delta[0, 0, 3] == 0


def test_soft_rates_scale_the_step_and_not_adams_gradient():
    def loss(delta):
        return (delta - 1).square().sum(dim=(1, 2))

    start, rates = torch.zeros(1, 2, 1), torch.tensor([[0.5, 1.5]])
    done = descend(
        autograd_gradient(loss), loss, start, rates, "adam", lr=0.1, steps=1, clip=9.0
    )
    torch.testing.assert_close(done.delta, torch.tensor([[[0.05], [0.15]]]))


def test_spsa_is_exact_on_average_for_quadratics(draw):
    """On a quadratic the difference is exact, and so is its mean over all signs."""
    aim = draw.normal(1, 2, 2)

    def loss(delta):
        return (delta - aim).square().sum(dim=(1, 2))

    free, point = torch.tensor([[True, False]]), torch.zeros(1, 2, 2)
    true = autograd_gradient(loss)(point)[1]
    pairs = 4000
    _, estimate = spsa_gradient(
        loss, point, free, 0.1, pairs, torch.Generator().manual_seed(0)
    )
    assert not estimate[0, 1].any()
    # variance of one pair's entry i: the sum of the other entries' squares
    error = (estimate - true)[0, 0].abs()
    spread = true[0, 0].flip(0).abs() / pairs**0.5
    assert (error <= 5 * spread + 1e-4).all()
