# SPDX-License-Identifier: Apache-2.0
"""Loss and gradient of a context: equal to independent runs and to differences."""

import pytest
import torch

from moe_tta.adapter import AdapterModel
from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.packing import PackedTexts
from moe_tta.adapter.survey import survey
from moe_tta.adapter.tail import Tail
from tests.adapter import independent

EPS = torch.finfo(torch.float32).eps


def tail_of(model, sequences, delta, lowest=0, skip=0, starts=None, recompute=False):
    texts = PackedTexts.of(sequences, model.device, starts)
    hidden = survey(model, texts, delta).inputs[lowest]
    return Tail(model, texts, hidden, lowest, skip, recompute)


def size(model):
    return len(model.shape.layers), model.shape.num_experts


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("scale", [0.0, 0.5])
def test_equals_independent_autograd(adapter, plain, draw, scale):
    delta = scale * draw.normal(*size(adapter))
    tokens = draw.tokens(40)
    loss, slope = independent.context_gradient(plain, tokens, delta)
    tail = tail_of(adapter, [tokens], delta[None])
    ours, gradient = autograd_gradient(tail.loss)(delta[None])
    assert abs(float(ours[0] - loss)) <= 1e-5 * float(loss)
    assert relative(gradient[0], slope) <= 1e-5


def test_no_vectors_give_the_plain_model(adapter, plain, draw):
    tokens = draw.tokens(30)
    hidden = adapter.embed(torch.tensor([tokens]))
    shared = adapter.shared(hidden, torch.arange(30)[None], None)
    hidden = adapter.run(hidden, range(len(adapter.layers)), shared, {})
    ours = adapter.lm.lm_head(adapter.lm.model.norm(hidden))
    assert relative(ours, plain(torch.tensor([tokens])).logits) <= 1e-5


def test_lowest_layer_cuts_the_gradient_and_not_the_loss(adapter, draw):
    delta, tokens = 0.3 * draw.normal(1, *size(adapter)), draw.tokens(25)
    whole = autograd_gradient(tail_of(adapter, [tokens], delta).loss)(delta)
    upper = tail_of(adapter, [tokens], delta, lowest=2)
    loss, slope = autograd_gradient(upper.loss)(delta)
    assert abs(float(loss - whole[0])) <= 1e-6 * float(loss)
    assert relative(slope[:, 2:], whole[1][:, 2:]) <= 1e-5
    assert not slope[:, :2].any()


def test_recomputing_changes_no_bit(adapter, draw):
    delta, tokens = 0.3 * draw.normal(1, *size(adapter)), draw.tokens(25)
    kept = autograd_gradient(tail_of(adapter, [tokens], delta).loss)(delta)
    tail = tail_of(adapter, [tokens], delta, recompute=True)
    again = autograd_gradient(tail.loss)(delta)
    assert torch.equal(kept[0], again[0])
    assert torch.equal(kept[1], again[1])


def test_rows_before_the_start_keep_the_models_rule(adapter, plain, draw):
    delta, tokens, start = draw.normal(*size(adapter)), draw.tokens(20), 12

    def late(number, logits):
        rows = torch.arange(len(logits))[:, None] >= start
        return torch.softmax(logits + rows * delta[number], dim=-1)

    ids = torch.tensor([tokens])
    with independent.gates(plain, late):
        wanted = plain(ids, labels=ids).loss
    tail = tail_of(adapter, [tokens], delta[None], starts=[start])
    assert abs(float(tail.loss(delta[None])[0] - wanted)) <= 1e-5 * float(wanted)


def test_skipped_tokens_are_context_only(adapter, plain, draw):
    tokens, skip = draw.tokens(20), 7
    labels = torch.tensor([[-100] * skip + tokens[skip:]])
    wanted = plain(torch.tensor([tokens]), labels=labels).loss
    zeros = torch.zeros(1, *size(adapter))
    ours = tail_of(adapter, [tokens], zeros, skip=skip).loss(zeros)[0]
    assert abs(float(ours - wanted)) <= 1e-5 * float(wanted)


def test_a_batch_gives_each_request_its_own_result(tiny_models, family, draw):
    """Batch and lone run stand equally far from float64, to a factor of two.

    Routers and norms work in float32 in every dtype, so float64 is as near to the
    truth as these models come; the bound is the lone run's own error plus one rounding
    of the loss for each layer.
    """
    path = tiny_models(family)
    rough = AdapterModel.from_checkpoint(path)
    exact = AdapterModel.from_checkpoint(path, torch.float64)
    sequences = [draw.tokens(count) for count in (9, 31, 16)]
    delta = 0.3 * draw.normal(3, *size(rough))
    together = autograd_gradient(tail_of(rough, sequences, delta).loss)(delta)
    for index, tokens in enumerate(sequences):
        own = delta[index : index + 1]
        alone = autograd_gradient(tail_of(rough, [tokens], own).loss)(own)
        true = autograd_gradient(tail_of(exact, [tokens], own).loss)(own)
        for ours, lone, best in zip(together, alone, true, strict=True):
            error = (ours[index] - best[0]).norm()
            rounding = len(rough.layers) * EPS * best.norm()
            assert error <= 2 * (lone - best).norm() + 4 * rounding


def central(loss, point, direction, step):
    with torch.no_grad():
        ends = [loss(point + sign * step * direction).double() for sign in (1, -1)]
    return float((ends[0] - ends[1]).sum() / (2 * step))


def count_agreeing(loss, point, directions, step=1e-2):
    """Compare the gradient with central differences, within what they can know.

    Their truncation error is a third of the change from 2h to h; norms and routers
    round in float32, which moves the loss by a few eps. Where an expert enters or
    leaves within 2h the loss jumps: the bound is then too wide to say anything, and
    the direction does not count.

    Returns:
        How many directions said something; all of these agreed.
    """
    value, slope = autograd_gradient(loss)(point)
    checked = 0
    for direction in directions:
        wanted = float((slope * direction).sum())
        fine, coarse = (central(loss, point, direction, h) for h in (step, 2 * step))
        bound = abs(fine - coarse) + 8 * EPS * float(value.sum()) / step
        if bound > 0.2 * abs(wanted):
            continue
        checked += 1
        assert abs(fine - wanted) <= bound
    return checked


def test_equals_central_differences(tiny_models, family, draw):
    model = AdapterModel.from_checkpoint(tiny_models(family), torch.float64)
    checked = 0
    for _ in range(4):
        delta, tokens = 0.2 * draw.normal(1, *size(model)), draw.tokens(5)
        loss = tail_of(model, [tokens], delta).loss
        _, slope = autograd_gradient(loss)(delta)
        checked += count_agreeing(loss, delta, near(slope, draw))
    assert checked >= 10, "too few directions without a jump"


def near(slope, draw):
    """Unit directions in which the loss changes much: the slope, and askew of it."""
    directions = [slope]
    for layer in range(slope.shape[1]):
        part = torch.zeros_like(slope)
        part[:, layer] = slope[:, layer]
        directions.append(part)
    for _ in range(5):
        askew = draw.normal(*slope.shape)
        directions.append(slope + askew * slope.norm() / askew.norm())
    return [direction / direction.norm() for direction in directions]


def test_bfloat16_is_as_near_to_float64_as_transformers(tiny_models, family, draw):
    """Both round alike often; ours may be twice as far as the independent run.

    Measured on the loss and on the gradient's norm-relative error, with the worst of
    several texts on each side, because in bfloat16 a near tie may fall to another
    expert in either.
    """
    path = tiny_models(family)
    exact = AdapterModel.from_checkpoint(path, torch.float64)
    rough = AdapterModel.from_checkpoint(path, torch.bfloat16)
    theirs = independent.load(path, torch.bfloat16)
    own, other = [], []
    for _ in range(6):
        tokens, delta = draw.tokens(24), 0.2 * draw.normal(*size(exact))
        true = autograd_gradient(tail_of(exact, [tokens], delta[None]).loss)
        _, slope = true(delta[None])
        ours = autograd_gradient(tail_of(rough, [tokens], delta[None]).loss)
        own.append(relative(ours(delta[None])[1], slope))
        other.append(
            relative(independent.context_gradient(theirs, tokens, delta)[1], slope[0])
        )
    # weights themselves are cast by both: one rounding more
    assert max(own) <= 2 * max(other) + torch.finfo(torch.bfloat16).eps
