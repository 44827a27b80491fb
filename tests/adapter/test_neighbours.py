# SPDX-License-Identifier: Apache-2.0
"""The neighbours' loss under an overridden row: exact, though most rows are cached."""

import pytest
import torch

from moe_tta.adapter import (
    AdapterError,
    AdapterModel,
    GradientDescent,
    Neighbour,
    NeighbourTail,
    descend_neighbours,
    last_row_routing,
    search_alpha,
)
from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.remixing import core_experts, to_distribution
from tests.adapter import independent
from tests.adapter.test_gradient import count_agreeing, near, relative

LAYERS = (1, 3)  # layer 2 between them keeps its own routing


@pytest.fixture
def texts(draw):
    """Prompts and answers of different lengths, a prompt of one token among them."""
    lengths = ((14, 1), (1, 3), (23, 4))
    return [(draw.tokens(p), draw.tokens(a)) for p, a in lengths]


def distributions(draw, model, requests):
    return torch.softmax(
        draw.normal(requests, len(LAYERS), model.shape.num_experts), dim=-1
    )


def test_equals_independent_full_runs(adapter, plain, draw, texts):
    omega = distributions(draw, adapter, 1)
    tail = NeighbourTail(adapter, [Neighbour(*text) for text in texts], LAYERS)
    ours = tail.nll(omega)
    for index, text in enumerate(texts):
        loss = independent.answer_loss(plain, *text, LAYERS, omega[0])
        assert abs(float(ours[index] - loss)) <= 1e-5 * float(loss)


def test_gradient_equals_independent_autograd(adapter, plain, draw, texts):
    omega, weights = distributions(draw, adapter, 1), (0.2, 1.0, 0.5)
    neighbours = [Neighbour(*t, w) for t, w in zip(texts, weights, strict=True)]
    tail = NeighbourTail(adapter, neighbours, LAYERS)
    loss, slope = autograd_gradient(tail.loss)(omega)
    wanted, gradient = 0.0, torch.zeros_like(omega[0])
    for text, weight in zip(texts, weights, strict=True):
        part = independent.answer_gradient(plain, *text, LAYERS, omega[0])
        wanted += weight * part[0] / sum(weights)
        gradient += weight * part[1] / sum(weights)
    assert abs(float(loss[0] - wanted)) <= 1e-5 * float(wanted)
    assert relative(slope[0], gradient) <= 1e-5


def test_gradient_equals_central_differences(tiny_models, family, draw, texts):
    model = AdapterModel.from_checkpoint(tiny_models(family), torch.float64)
    tail = NeighbourTail(model, [Neighbour(*text) for text in texts], LAYERS)
    checked = 0
    for _ in range(4):
        omega = distributions(draw, model, 1)
        _, slope = autograd_gradient(tail.loss)(omega)
        # a smaller step than for logits: entries of omega are of the order of 1/E
        checked += count_agreeing(tail.loss, omega, near(slope, draw), step=2e-3)
    assert checked >= 10, "too few directions without a jump"


def test_requests_do_not_meet(adapter, draw, texts):
    omega = distributions(draw, adapter, 2)
    shared = [Neighbour(*texts[0], owner=0), Neighbour(*texts[2], owner=1)]
    both = autograd_gradient(NeighbourTail(adapter, shared, LAYERS).loss)(omega)
    for owner, text in enumerate((texts[0], texts[2])):
        alone = NeighbourTail(adapter, [Neighbour(*text)], LAYERS)
        loss, slope = autograd_gradient(alone.loss)(omega[owner : owner + 1])
        assert abs(float(both[0][owner] - loss)) <= 1e-5 * float(loss)
        assert relative(both[1][owner], slope[0]) <= 1e-5


def test_own_routing_gives_the_plain_loss(adapter, plain, texts):
    prompts = [prompt for prompt, _ in texts]
    own = last_row_routing(adapter, prompts)[:, list(LAYERS)]
    neighbours = [Neighbour(*text, owner=n) for n, text in enumerate(texts)]
    ours = NeighbourTail(adapter, neighbours, LAYERS).nll(own)
    for index, (prompt, answer) in enumerate(texts):
        labels = [-100] * len(prompt) + answer
        ids = torch.tensor([prompt + answer])
        loss = plain(ids, labels=torch.tensor([labels])).loss
        assert abs(float(ours[index] - loss)) <= 1e-5 * float(loss)


def test_what_is_cached_is_keys_values_and_inputs(adapter, texts):
    tail = NeighbourTail(adapter, [Neighbour(*text) for text in texts], LAYERS)
    config = adapter.config
    width = config.hidden_size // config.num_attention_heads
    width = getattr(config, "head_dim", None) or width
    prefix = max(len(prompt) for prompt, _ in texts) - 1
    layers = config.num_hidden_layers - LAYERS[0]
    rows = 2 * layers * prefix * config.num_key_value_heads * width
    rows += max(len(answer) for _, answer in texts) * config.hidden_size
    assert tail.nbytes == 4 * len(texts) * rows


def test_descent_lowers_the_loss_inside_the_core(adapter, draw, texts):
    prompts = [prompt for prompt, _ in texts]
    own = last_row_routing(adapter, prompts)[:1, list(LAYERS)]
    tail = NeighbourTail(adapter, [Neighbour(*text) for text in texts], LAYERS)
    done = descend_neighbours(tail, own, GradientDescent(core=6))
    assert done.finite.all()
    assert done.losses.shape == (1, 11)
    assert float(done.losses[0, -1]) < float(done.losses[0, 0])
    assert not done.omega[~core_experts(own, 6)].any()
    assert (done.omega >= 0).all()
    torch.testing.assert_close(done.omega.sum(-1), torch.ones(1, len(LAYERS)))


def test_rate_zero_changes_nothing(adapter, texts):
    own = last_row_routing(adapter, [texts[0][0]])[:, list(LAYERS)]
    tail = NeighbourTail(adapter, [Neighbour(*texts[0])], LAYERS)
    done = descend_neighbours(tail, own, GradientDescent(lr=0.0, lr_end=0.0, core=99))
    # each step divides by a sum that is 1 up to rounding
    torch.testing.assert_close(done.omega, own, rtol=1e-5, atol=0)
    torch.testing.assert_close(done.losses, done.losses[:, :1].expand(1, 11))


def test_a_request_that_is_not_finite_goes_back_alone(adapter, draw, texts):
    own = distributions(draw, adapter, 2)
    own[0, 0, 0] = float("nan")
    neighbours = [Neighbour(*texts[0], owner=0), Neighbour(*texts[2], owner=1)]
    tail = NeighbourTail(adapter, neighbours, LAYERS)
    done = descend_neighbours(tail, own, GradientDescent(steps=2))
    assert done.finite.tolist() == [False, True]
    assert torch.equal(done.omega[0].isnan(), own[0].isnan())
    assert done.omega[1].isfinite().all()
    alone = NeighbourTail(adapter, [Neighbour(*texts[2])], LAYERS)
    lone = descend_neighbours(alone, own[1:], GradientDescent(steps=2))
    assert relative(done.omega[1], lone.omega[0]) <= 1e-5


def test_line_search_finds_the_grids_best(adapter, draw, texts):
    own, other = (distributions(draw, adapter, 1) for _ in range(2))
    tail = NeighbourTail(adapter, [Neighbour(*text) for text in texts], LAYERS)
    line = search_alpha(tail, own, other, points=5)
    with torch.no_grad():
        grid = [
            tail.loss(a * own + (1 - a) * other)[0] for a in torch.linspace(0, 1, 5)
        ]
    assert float(line.loss[0]) <= float(min(grid)) * (1 + 1e-6)
    mixed = line.alpha[0] * own + (1 - line.alpha[0]) * other
    torch.testing.assert_close(line.omega, mixed)
    same = search_alpha(tail, own, own, points=3)
    assert same.alpha.tolist() == [1.0]


def test_core_and_projection_by_hand():
    omega = torch.tensor([0.1, 0.4, 0.1, 0.3, 0.1])
    assert core_experts(omega, 3).tolist() == [True, True, False, True, False]
    cut = to_distribution(torch.tensor([0.5, -0.2, 0.0, 1.5]))
    assert cut.tolist() == [0.25, 0.0, 0.0, 0.75]


def test_refuses_empty_texts_and_foreign_layers(tiny_models):
    model = AdapterModel.from_checkpoint(tiny_models("mixtral"))
    with pytest.raises(AdapterError, match="one token"):
        NeighbourTail(model, [Neighbour([3], [])], LAYERS)
    with pytest.raises(AdapterError, match=r"\[9\] are not MoE layers"):
        NeighbourTail(model, [Neighbour([3], [4])], (9,))
