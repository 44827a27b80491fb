# SPDX-License-Identifier: Apache-2.0
"""Rounds of rerouting: their steps, their choices, and what goes wrong alone."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_tta.adapter import AdapterModel, Outcome, Rerouting, reroute
from moe_tta.adapter.choice import hard_choice, named_choice, soft_choice
from moe_tta.adapter.contexts import Contexts
from moe_tta.adapter.descent import autograd_gradient, descend
from moe_tta.adapter.spsa import spsa_gradient
from moe_tta.adapter.tail import Tail, survey
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

    monkeypatch.setattr(Tail, "loss", full)
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
    contexts = Contexts.of([tokens, tokens[:7]], adapter.device)
    ours = survey(adapter, contexts, zeros(adapter, 2)).uncertainty
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


def test_spsa_repeats_by_its_seed(model, draw):
    tokens = draw.tokens(12)

    def run(seed):
        settings = Rerouting(optimizer="spsa", steps=1, pairs=1, seed=seed)
        return reroute(model, [tokens], zeros(model, 1), settings)[0].delta

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


class _Largest(TorchDispatchMode):
    """Counts bytes of every tensor that operators make, views aside."""

    def __init__(self, old):
        super().__init__()
        self.known, self.largest = set(old), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else [made]:
            if not isinstance(value, torch.Tensor):
                continue
            storage = value.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.largest = max(self.largest, storage.nbytes())
        return made


def saved_bytes(tail, delta, weights):
    """Return the bytes that one forward keeps for backward, weights aside."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = tail.loss(delta.requires_grad_())
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("recompute", [False, True])
def test_memory_grows_with_rows_and_not_with_weights(adapter, draw, recompute):
    """Kept for backward: a bound per row and layer; no operator makes a weight's copy.

    Per row and layer at most: 16 vectors of H outside the experts (residuals, the two
    norms in float32 and out, q, k, v before and after rotation, attention), and for
    each of K experts 3 of H (rows in, out, weighted) and 5 of I; 6 of E for routing.
    Recomputing keeps the layer's input alone.
    """
    tokens = draw.tokens(48)
    contexts = Contexts.of([tokens], adapter.device)
    hidden = survey(adapter, contexts, zeros(adapter, 1)).inputs[0]
    tail = Tail(adapter, contexts, hidden, 0, 0, recompute)
    weights = {w.untyped_storage().data_ptr() for _, w in adapter.weights()}
    config = adapter.config
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    heads = config.num_attention_heads * (getattr(config, "head_dim", None) or 32)
    width = max(config.hidden_size, heads)
    routed = adapter.shape.top_k * (3 * width + 5 * inner + 4)
    row = (
        2 * width if recompute else 16 * width + routed + 6 * adapter.shape.num_experts
    )
    per_layer = 4 * len(tokens) * row
    tables = 4 * 4 * adapter.shape.num_experts  # S + 1 rows of each edit
    head = 4 * len(tokens) * 3 * width  # input of the loss, and the rope's tables
    kept = saved_bytes(tail, zeros(adapter, 1), weights)
    assert kept <= len(adapter.layers) * (per_layer + tables) + head
    with _Largest(weights) as seen:
        autograd_gradient(tail.loss)(zeros(adapter, 1))
    experts = adapter.shape.num_experts * 3 * inner * config.hidden_size * 4
    logits = 4 * len(tokens) * config.vocab_size
    assert seen.largest <= max(logits, 4 * len(tokens) * routed)
    assert seen.largest < experts
