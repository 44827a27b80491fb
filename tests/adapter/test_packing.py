# SPDX-License-Identifier: Apache-2.0
"""Packed texts: where their rows stand, the two moves, and that texts stay apart."""

import pytest
import torch

from moe_tta.adapter import AdapterModel
from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.packing import PackedTexts
from moe_tta.adapter.survey import survey
from moe_tta.adapter.tail import Tail
from tests.adapter import independent
from tests.adapter.test_gradient import EPS, relative, size

CPU = torch.device("cpu")
NAN = float("nan")
LENGTHS = (9, 47, 33)  # of windows of 32 tokens, too
STARTS, SKIP = (4, 0, 32), 3


def packing_of(lengths, extent=None):
    texts = [[2] * length for length in lengths]
    return PackedTexts.of(texts, CPU, extent=extent).packing


def test_texts_by_hand():
    texts = PackedTexts.of([[5, 6, 7], [8], [9, 4]], CPU, [1, 0, 2], (8, 4))
    assert texts.size == (3, 4, 8)
    assert texts.tokens.tolist() == [[5, 6, 7, 8, 9, 4, 0, 0]]
    assert texts.positions.tolist() == [[0, 1, 2, 0, 0, 1, 0, 0]]
    assert texts.slots.tolist() == [0, 1, 1, 2, 0, 0, 0, 0]
    packing = texts.packing
    assert packing.places.tolist() == [[0, 1, 2, -1], [3, -1, -1, -1], [4, 5, -1, -1]]
    assert packing.columns.tolist() == [0, 1, 2, 4, 8, 9, -1, -1]
    assert texts.scored(0).sum(dim=1).tolist() == [2, 0, 1]
    assert texts.scored(2)[0].tolist() == [False, True, False, False]


def test_the_extent_is_what_texts_need():
    texts = PackedTexts.of([[5, 6, 7], [8]], CPU)
    assert texts.size == (2, 3, 4)
    assert texts.packing.columns.min() == 0


@pytest.mark.parametrize("extent", [None, (13, 8)])
def test_moves_are_plain_indexing(draw, extent):
    """Forward and back, where padding is 0 and counts for nothing."""
    packing = packing_of((3, 1, 5), extent)
    count, real = len(packing.columns), packing.places >= 0
    rows = draw.normal(1, count, 2, 3).requires_grad_()
    spread = packing.spread(rows)
    assert torch.equal(spread[real], rows[0, : 3 + 1 + 5])
    assert not spread[~real].any()
    grad = draw.normal(*spread.shape)
    wanted = torch.zeros_like(rows)
    wanted[0, packing.places[real]] = grad[real]
    assert torch.equal(torch.autograd.grad(spread, rows, grad)[0], wanted)

    apart = draw.normal(*spread.shape).requires_grad_()
    gathered = packing.gather(apart)
    assert torch.equal(gathered[0, : 3 + 1 + 5], apart[real])
    assert not gathered[0, 3 + 1 + 5 :].any()
    grad = draw.normal(*gathered.shape)
    wanted = torch.zeros_like(apart)
    wanted[real] = grad[0, : 3 + 1 + 5]
    assert torch.equal(torch.autograd.grad(gathered, apart, grad)[0], wanted)


def test_moves_have_the_gradient_of_differences(draw):
    packing = packing_of((3, 1, 4), (10, 5))
    rows = draw.normal(1, 10, 2).double().requires_grad_()
    apart = draw.normal(3, 5, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(packing.spread, (rows,))
    assert torch.autograd.gradcheck(packing.gather, (apart,))
    whole = packing_of((3,))
    assert torch.autograd.gradcheck(whole.spread, (rows[:, :3],))


def test_one_text_is_not_moved(draw):
    for extent in (None, (8, 8)):
        packing = packing_of((6,), extent)
        rows = draw.normal(1, len(packing.columns), 3)
        assert packing.spread(rows) is rows
        assert packing.gather(rows) is rows


def test_nan_stays_with_its_text(draw):
    """Forward and back; and what is nobody's goes nowhere."""
    packing = packing_of((3, 1, 4), (10, 5))
    rows = draw.normal(1, 10, 2)
    rows[:, :3] = rows[:, 8:] = NAN
    real = packing.places >= 0
    spread = packing.spread(rows.requires_grad_())
    assert spread[0, :3].isnan().all()
    assert spread[1:].isfinite().all()
    grad = torch.full_like(spread, NAN)
    grad[1:][real[1:]] = 1.0
    (back,) = torch.autograd.grad(spread, rows, grad)
    assert back.isfinite()[0, :, 0].tolist() == [False] * 3 + [True] * 7

    apart = spread.detach().clone()
    apart[~real] = NAN
    gathered = packing.gather(apart.requires_grad_())
    assert gathered.isfinite()[0, :, 0].tolist() == [False] * 3 + [True] * 7
    (back,) = torch.autograd.grad(gathered, apart, torch.full_like(gathered, NAN))
    assert not back[~real].any()


def measure(model, sequences, delta, starts, extent=None, recompute=False, skip=SKIP):
    """Return C_l, losses and gradients of texts in one batch."""
    texts = PackedTexts.of(sequences, model.device, starts, extent)
    found = survey(model, texts, delta)
    tail = Tail(model, texts, found.inputs[0], 0, skip, recompute)
    return found.uncertainty, *autograd_gradient(tail.loss)(delta)


@pytest.mark.parametrize("extent", [None, (100, 64)])
def test_packed_texts_are_each_alone(tiny_models, family, draw, extent):
    """Bounds as in `test_a_batch_gives_each_request_its_own_result`."""
    path = tiny_models(family)
    rough = AdapterModel.from_checkpoint(path)
    exact = AdapterModel.from_checkpoint(path, torch.float64)
    sequences = [draw.tokens(length) for length in LENGTHS]
    delta = 0.3 * draw.normal(3, *size(rough))
    together = measure(rough, sequences, delta, STARTS, extent)
    for index, tokens in enumerate(sequences):
        own = [tokens], delta[index : index + 1], STARTS[index : index + 1]
        alone, true = measure(rough, *own), measure(exact, *own)
        for ours, lone, best in zip(together, alone, true, strict=True):
            error = (ours[index] - best[0]).norm()
            rounding = len(rough.layers) * EPS * best.norm()
            assert error <= 2 * (lone - best).norm() + 4 * rounding


def test_windows_are_of_each_text(tiny_models, draw):
    """Mixtral's, which transformers' own model has of one text after another."""
    path = tiny_models("mixtral")
    model, plain = AdapterModel.from_checkpoint(path), independent.load(path)
    model.config.sliding_window = plain.config.sliding_window = 8
    sequences = [draw.tokens(length) for length in LENGTHS]
    delta = 0.3 * draw.normal(3, *size(model))
    _, losses, slope = measure(model, sequences, delta, None, (96, 64), skip=0)
    for index, tokens in enumerate(sequences):
        wanted, theirs = independent.context_gradient(plain, tokens, delta[index])
        assert abs(float(losses[index] - wanted)) <= 1e-5 * float(wanted)
        assert relative(slope[index], theirs) <= 1e-5
    model.config.sliding_window = None
    _, without, _ = measure(model, sequences, delta, None, (96, 64), skip=0)
    assert relative(without[1:], losses[1:]) > 1e-3


@pytest.mark.parametrize("recompute", [False, True])
def test_nobodys_rows_are_harmless(adapter, draw, recompute):
    """However many, and whatever their token's embedding is, but for roundings."""
    sequences = [draw.tokens(length) for length in (12, 5)]
    delta = 0.3 * draw.normal(2, *size(adapter))
    wanted = measure(adapter, sequences, delta, None)
    embedding = adapter.lm.model.embed_tokens
    embedding.weight = torch.nn.Parameter(embedding.weight.clone(), False)
    for value, extent in ((0.1, (17, 40)), (1e4, (18, 12)), (NAN, (64, 64))):
        embedding.weight[0] = value
        found = measure(adapter, sequences, delta, None, extent, recompute)
        for ours, theirs in zip(found, wanted, strict=True):
            assert relative(ours, theirs) <= 1e-5


def test_one_text_may_be_longer_than_it_is(adapter, draw):
    """Nobody's rows are then its padding, which no row before them sees."""
    tokens, delta = draw.tokens(45), 0.3 * draw.normal(1, *size(adapter))
    wanted = measure(adapter, [tokens], delta, [7])
    for extent in ((64, 64), (50, 45)):
        found = measure(adapter, [tokens], delta, [7], extent)
        for ours, theirs in zip(found, wanted, strict=True):
            assert relative(ours, theirs) <= 1e-5
