# SPDX-License-Identifier: Apache-2.0
"""Token stores built through the adapter: what they hold is what the model does."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from moe_tta.adapter.assignments import LabelledText, TokenDescent, assign_tokens
from moe_tta.adapter.errors import AdapterError
from moe_tta.remix.errors import StoreError
from moe_tta.remix.tokens import load_tokens
from moe_tta.remix.tokens_build import TokenOptions, build_tokens
from moe_tta.replica import gates
from tests.remix.tokens import encode, reference_model, write_labelled

PAIRS = [("abc", "de"), ("abcd", "fgh"), ("the sky is", "blue"), ("abc", "de")]
NO_STEPS = TokenDescent(steps=0)


@pytest.fixture(scope="module", params=["mixtral", "olmoe"])
def folder(tiny_models, request):
    return tiny_models(request.param)


@pytest.fixture(scope="module")
def model(folder):
    return reference_model(folder)


@pytest.fixture
def data(tmp_path):
    return write_labelled(tmp_path / "data.jsonl", PAIRS)


def routers(folder, tokens):
    """Return what a transformers model gives its routers, and what they answer."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = []

    def note(module, inputs, output):
        seen.append((inputs[0].reshape(-1, inputs[0].shape[-1]), output[1], output[2]))

    for gate in gates(plain, getattr(plain.config, "num_experts", None) or 8):
        gate.register_forward_hook(note)
    with torch.inference_mode():
        plain(torch.tensor([tokens]))
    return seen


def test_without_steps_the_store_holds_the_routers_own(folder, model, data, tmp_path):
    options = TokenOptions(scored="text", descent=NO_STEPS)
    store = build_tokens(model, data, tmp_path / "store", options)
    tokens = encode("abc de")
    rows = len(tokens) - 1  # all but the last, which predicts nothing
    for (_, layer), (hidden, weights, ids) in zip(
        store.layers(), routers(folder, tokens), strict=True
    ):
        keys = hidden / hidden.norm(dim=1, keepdim=True)
        np.testing.assert_allclose(layer.keys[:rows], keys[:rows], atol=1e-5)
        np.testing.assert_array_equal(layer.ids[:rows], ids[:rows])
        np.testing.assert_allclose(layer.weights[:rows], weights[:rows], atol=1e-5)
    descent = store.card.descent
    assert descent.before == descent.after
    assert store.card.counts.unimproved == 0


def test_counts_and_tokens_with_the_same_text_before_them(model, data, tmp_path):
    options = TokenOptions(descent=NO_STEPS)
    counts = build_tokens(model, data, tmp_path / "label", options).card.counts
    # " de" twice, " fgh" and " blue": the second " de" adds nothing
    assert (counts.questions, counts.repeated, counts.tokens) == (4, 3, 3 + 4 + 5)
    options = TokenOptions(scored="text", descent=NO_STEPS)
    counts = build_tokens(model, data, tmp_path / "text", options).card.counts
    lengths = [len(encode(f"{prompt} {answer}")) - 1 for prompt, answer in PAIRS]
    # "abc" and a first token are shared by three texts, a first token by all
    assert counts.tokens + counts.repeated == sum(lengths)
    assert counts.repeated == 4 + lengths[3] + 1


def test_steps_make_the_labels_likelier(model, data, tmp_path):
    options = TokenOptions(descent=TokenDescent(steps=5, lr=0.3))
    store = build_tokens(model, data, tmp_path / "store", options)
    descent = store.card.descent
    assert descent.after < descent.before - 0.01
    own = build_tokens(model, data, tmp_path / "own", TokenOptions(descent=NO_STEPS))
    assert own.card.descent.before == descent.before
    for (_, ours), (_, theirs) in zip(store.layers(), own.layers(), strict=True):
        np.testing.assert_array_equal(ours.keys, theirs.keys)
    changed = [
        not np.array_equal(ours.weights, theirs.weights)
        for (_, ours), (_, theirs) in zip(store.layers(), own.layers(), strict=True)
    ]
    assert all(changed)


def test_gradient_equals_finite_differences(folder):
    """Of the loss that the descent follows, over rows and layers drawn at random."""
    from moe_tta.adapter.assignments import _Batch

    model = reference_model(folder).adapter
    batch = _Batch(model, [LabelledText(encode("abc de"), 4)])
    size = (1, len(model.shape.layers), batch.length * model.shape.num_experts)
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        leaf = (0.1 * torch.randn(size, generator=generator)).requires_grad_()
        (slope,) = torch.autograd.grad(batch.loss(leaf).sum(), leaf)
    touched = slope.view(*size[:2], batch.length, -1).abs().sum(dim=(0, 1, 3)) > 0
    scored = torch.zeros(batch.length, dtype=torch.bool)
    scored[3:6] = True  # the rows that predict " de"
    assert torch.equal(touched, scored)
    step = 1e-2
    with torch.no_grad():
        direction = slope / slope.norm()
        up, down = (batch.loss(leaf + sign * step * direction) for sign in (1, -1))
    # central differences: the cubic term at this step, and float32 losses of about 6
    measured = float(up - down) / (2 * step)
    assert measured == pytest.approx(float(slope.norm()), rel=0.02)


def test_companions_change_nothing(model):
    """A text is optimised alone as in a batch, but for rounding."""
    texts = [LabelledText(encode(f"{p} {a}"), 1 + len(p)) for p, a in PAIRS[:3]]
    settings = TokenDescent(steps=2, lr=0.1)
    batch = assign_tokens(model.adapter, texts, settings)
    for number, text in enumerate(texts):
        alone = assign_tokens(model.adapter, [text], settings)
        rows = batch.owners == number
        assert torch.equal(batch.positions[rows], alone.positions)
        torch.testing.assert_close(batch.keys[:, rows], alone.keys, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            batch.losses[number], alone.losses[0], atol=1e-3, rtol=0
        )


def test_the_build_ends_with_max_tokens(model, data, tmp_path):
    options = TokenOptions(descent=NO_STEPS, max_tokens=5)
    store = build_tokens(model, data, tmp_path / "store", options)
    assert store.card.counts.tokens == 5
    assert load_tokens(store.path).card == store.card
    with pytest.raises(StoreError, match="exists already"):
        build_tokens(model, data, store.path, options)


def test_texts_that_give_nothing(model, tmp_path):
    data = write_labelled(tmp_path / "long.jsonl", [("x" * 600, "y")])
    with pytest.raises(StoreError, match="none of 1 questions gave a token"):
        build_tokens(model, data, tmp_path / "store", TokenOptions())
    assert not (tmp_path / "store").exists()
    with pytest.raises(AdapterError, match="a token to score"):
        assign_tokens(model.adapter, [LabelledText([1, 2], 2)], NO_STEPS)


def test_keys_in_half_precision(model, data, tmp_path):
    options = TokenOptions(descent=NO_STEPS, precision="float16")
    store = build_tokens(model, data, tmp_path / "store", options)
    for _, layer in store.layers():
        assert layer.keys.dtype == np.float16
