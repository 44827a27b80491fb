# SPDX-License-Identifier: Apache-2.0
"""Rounds of rerouting: what they do, and what goes wrong alone."""

import pytest
import torch

from moe_tta.adapter import AdapterError, AdapterModel, Outcome, Rerouting, reroute
from moe_tta.adapter.packing import PackedTexts
from moe_tta.adapter.survey import survey
from moe_tta.adapter.tail import Tail
from tests.adapter import independent
from tests.adapter.test_gradient import relative, size


@pytest.fixture
def model(tiny_models):
    return AdapterModel.from_checkpoint(tiny_models("mixtral"))


def zeros(model, count):
    return torch.zeros(count, *size(model))


def test_steps_are_those_of_independent_gradients(adapter, plain, draw):
    """Five steps by hooks and transformers' own loss; SGD, which amplifies nothing."""
    tokens, chosen = draw.tokens(20), (1, 3)
    settings = Rerouting(steps=5, layers=chosen, optimizer="sgd", lr=1.0)
    done = reroute(adapter, [tokens], zeros(adapter, 1), settings)[0]
    delta, losses = torch.zeros(*size(adapter)), []
    for _ in range(5):
        loss, slope = independent.context_gradient(plain, tokens, delta)
        losses.append(float(loss))
        delta[list(chosen)] -= slope[list(chosen)]
    assert done.outcome is Outcome.ADAPTED
    assert done.layers == chosen
    assert relative(done.delta, delta) <= 1e-5
    assert done.losses[:5] == pytest.approx(losses, rel=1e-5)
    assert not done.delta[[0, 2]].any()


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "spsa"])
def test_rate_zero_changes_nothing(model, draw, optimizer):
    start = 0.1 * draw.normal(1, *size(model))
    settings = Rerouting(lr=0.0, optimizer=optimizer, steps=2)
    done = reroute(model, [draw.tokens(15)], start, settings)[0]
    assert torch.equal(done.delta, start[0])


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "spsa"])
def test_the_loss_falls(model, draw, optimizer):
    lr = {"adam": 0.05, "sgd": 1.0, "spsa": 1.0}[optimizer]
    settings = Rerouting(lr=lr, optimizer=optimizer, share=1.0, steps=8)
    sequences = [draw.tokens(count) for count in (30, 18)]
    for done in reroute(model, sequences, zeros(model, 2), settings):
        assert done.losses[-1] < done.losses[0]
        assert done.delta.abs().max() <= settings.clip


def test_without_the_last_loss_a_round_ends_where_it_did(model, draw):
    tokens, start = draw.tokens(20), 0.1 * draw.normal(1, *size(model))
    [told] = reroute(model, [tokens], start, Rerouting(steps=3))
    [untold] = reroute(model, [tokens], start, Rerouting(steps=3, last_loss=False))
    assert torch.equal(untold.delta, told.delta)
    assert untold.losses == told.losses[:3]
    assert (untold.outcome, untold.layers) == (told.outcome, told.layers)


def test_a_batch_is_its_requests(adapter, draw):
    sequences = [draw.tokens(count) for count in (9, 31, 16)]
    # SGD: Adam divides small gradients by themselves, and so amplifies their rounding
    settings = Rerouting(optimizer="sgd", lr=1.0, steps=3)
    together = reroute(adapter, sequences, zeros(adapter, 3), settings)
    for tokens, ours in zip(sequences, together, strict=True):
        alone = reroute(adapter, [tokens], zeros(adapter, 1), settings)[0]
        assert ours.layers == alone.layers
        assert relative(ours.delta, alone.delta) <= 1e-5
        assert ours.losses == pytest.approx(alone.losses, rel=1e-5)


def test_clip_holds_every_entry(model, draw):
    settings = Rerouting(lr=1.0, clip=0.3, steps=3)
    done = reroute(model, [draw.tokens(20)], zeros(model, 1), settings)[0]
    assert done.delta.abs().max() == pytest.approx(0.3)


def test_what_is_not_finite_stays_with_its_request(model, draw):
    sequences = [draw.tokens(20), draw.tokens(14)]
    start = zeros(model, 2)
    start[0, 2, 1] = float("nan")
    settings = Rerouting(optimizer="sgd", lr=1.0, layers=(1, 2))
    bad, good = reroute(model, sequences, start, settings)
    assert bad.outcome is Outcome.NON_FINITE
    assert torch.equal(bad.delta.isnan(), start[0].isnan())
    assert good.outcome is Outcome.ADAPTED
    alone = reroute(model, sequences[1:], start[1:], settings)[0]
    assert relative(good.delta, alone.delta) <= 1e-5


def test_texts_without_a_scored_token_are_named(model, draw):
    sequences = [[], [5], draw.tokens(12), draw.tokens(4)]
    settings = Rerouting(steps=1, skip=4)
    done = reroute(model, sequences, zeros(model, 4), settings)
    outcomes = [one.outcome for one in done]
    assert outcomes == [Outcome.NO_TARGETS] * 2 + [Outcome.ADAPTED, Outcome.NO_TARGETS]
    assert [len(one.losses) for one in done] == [0, 0, 2, 0]


def test_out_of_memory_adapts_nobody_and_raises_nothing(model, draw, monkeypatch):
    def full(self, delta):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Tail, "gradient", full)
    start = draw.normal(2, *size(model))
    done = reroute(model, [draw.tokens(9), draw.tokens(12)], start, Rerouting())
    assert [one.outcome for one in done] == [Outcome.OUT_OF_MEMORY] * 2
    assert torch.equal(done[1].delta, start[1])


def test_runs_where_a_worker_would_call_it(model, draw):
    tokens = draw.tokens(16)
    outside = reroute(model, [tokens], zeros(model, 1), Rerouting())[0]
    with torch.inference_mode():
        inside = reroute(model, [tokens], zeros(model, 1), Rerouting())[0]
        assert torch.is_inference_mode_enabled()
    assert torch.equal(inside.delta, outside.delta)
    assert not inside.delta.is_inference()


def test_uncertainty_is_the_mean_surprise_of_chosen_experts(adapter, plain, draw):
    tokens = draw.tokens(12)
    texts = PackedTexts.of([tokens, tokens[:7]], adapter.device)
    ours = survey(adapter, texts, zeros(adapter, 2)).uncertainty
    for index, text in enumerate((tokens, tokens[:7])):
        found = {}

        def keep(number, logits, found=found):
            found[number] = torch.softmax(logits, dim=-1)
            return found[number]

        with independent.gates(plain, keep):
            plain(torch.tensor([text]))
        for number, p in found.items():
            wanted = -p.topk(adapter.shape.top_k).values.log().mean()
            assert float(ours[index, number]) == pytest.approx(float(wanted), rel=1e-5)


def test_spsa_repeats_by_its_seed(model, draw):
    tokens = draw.tokens(12)

    def run(seed):
        settings = Rerouting(optimizer="spsa", steps=1, pairs=1, seed=seed)
        return reroute(model, [tokens], zeros(model, 1), settings)[0].delta

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_settings_name_what_is_allowed(model, draw):
    with pytest.raises(ValueError, match=r"'lion', expected one of \('adam', 'sgd'"):
        Rerouting(optimizer="lion")
    with pytest.raises(ValueError, match="more than 0"):
        Rerouting(share=0.0)
    with pytest.raises(AdapterError, match=r"\[7\] are none of \[0, 1, 2, 3\]"):
        reroute(model, [draw.tokens(5)], zeros(model, 1), Rerouting(layers=(7,)))
