# SPDX-License-Identifier: Apache-2.0
"""`FusedAttention` against transformers' own modules, on a CPU."""

import copy

import pytest
import torch

from moe_tta.adapter import AdapterModel
from moe_tta.adapter.attention import FusedAttention, Projection
from moe_tta.adapter.contexts import causal_mask
from moe_tta.adapter.packing import PackedTexts
from tests.adapter.layouts import vllm_tensors

EPS = torch.finfo(torch.float32).eps
ROWS, LENGTH, BEFORE, WINDOW = 2, 17, 6, 5
LENGTHS = (LENGTH, 8)  # of packed texts
PASSES = ("causal", "windowed", "cached", "packed", "packed and windowed")


def served(path, dtype=torch.float32):
    """An adapter of vLLM's tensors, with norms and biases that are not 1 and 0."""
    config, tensors = vllm_tensors(path)
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if "norm" in name or name.endswith("bias"):
            tensor += 0.5 * torch.randn(tensor.shape, generator=generator)
    return AdapterModel.from_served(
        config, {name: tensor.to(dtype) for name, tensor in tensors.items()}
    )


class Before:
    """Keys and values that stand before those of a pass."""

    def __init__(self, layer, shape, dtype):
        generator = torch.Generator().manual_seed(6)
        self.layer = layer
        self.pair = [torch.randn(shape, generator=generator).to(dtype) for _ in "kv"]

    def update(self, keys, values, layer):
        assert layer == self.layer
        new = keys, values
        return [torch.cat(pair, dim=2) for pair in zip(self.pair, new, strict=True)]


def arguments(model, layer, dtype, which):
    """Hidden states, and what a decoder layer passes on for the pass named `which`."""
    config, generator = model.config, torch.Generator().manual_seed(7)
    shape = ROWS, LENGTH, config.hidden_size
    positions, mask, cache = torch.arange(LENGTH)[None], None, None
    packing = None
    if "packed" in which:
        texts = [[2] * length for length in LENGTHS]
        texts = PackedTexts.of(texts, torch.device("cpu"), extent=(32, LENGTH))
        shape = 1, 32, config.hidden_size
        positions, packing = texts.positions, texts.packing
    hidden = torch.randn(shape, generator=generator).to(dtype).requires_grad_()
    if "windowed" in which:
        mask = causal_mask(LENGTH, WINDOW, torch.device("cpu"))
    if which == "cached":
        positions = torch.stack([positions[0] + BEFORE, positions[0] + BEFORE - 2])
        mask = torch.ones(ROWS, 1, LENGTH, BEFORE + LENGTH, dtype=torch.bool)
        mask = mask.tril(BEFORE)
        mask[1, :, :, BEFORE - 2 : BEFORE] = False  # a shorter text
        width = model.layers[layer].self_attn.head_dim
        heads = ROWS, config.num_key_value_heads, BEFORE, width
        cache = Before(layer, heads, dtype)
    shared = model.shared(hidden, positions, mask, cache, packing)
    return hidden, {
        "position_embeddings": shared.rope,
        "attention_mask": mask,
        "past_key_values": cache,
        "packing": packing,
        "position_ids": None,
        "use_cache": False,
    }


def run(attention, hidden, given):
    """Return the output and the gradient of the hidden states."""
    out, nothing = attention(hidden_states=hidden, **given)
    assert nothing is None
    generator = torch.Generator().manual_seed(8)
    grad = torch.randn(out.shape, generator=generator).to(out.dtype)
    return out.detach(), *torch.autograd.grad(out, hidden, grad)


@pytest.mark.parametrize("which", PASSES)
def test_float32_equals_transformers(tiny_models, family, which):
    """A number passes four sums one after the other, of H, D, keys and H numbers.

    Each errs by at most as many roundings of half an eps, on both sides; their
    conditions are near 1 for random numbers, and scores are below 1.
    """
    model = served(tiny_models(family))
    theirs = model.layers[2].self_attn
    hidden, given = arguments(model, 2, torch.float32, which)
    want = run(theirs, hidden, given)
    found = run(FusedAttention(theirs), hidden, given)
    units = 2 * model.config.hidden_size + theirs.head_dim + LENGTH + BEFORE
    for ours, other in zip(found, want, strict=True):
        assert (ours - other).norm() <= units * EPS * other.norm()


@pytest.mark.parametrize("which", PASSES)
def test_bfloat16_is_as_near_as_transformers(tiny_models, family, which):
    """Both from float32's result with the same, rounded weights and inputs."""
    model = served(tiny_models(family), torch.bfloat16)
    theirs = model.layers[2].self_attn
    hidden, given = arguments(model, 2, torch.bfloat16, which)
    exact = copy.deepcopy(theirs).float()
    wide = {**given, "position_embeddings": [t.float() for t in model_rope(given)]}
    if which == "cached":
        wide["past_key_values"] = copy.deepcopy(given["past_key_values"])
        wide["past_key_values"].pair = [
            part.float() for part in given["past_key_values"].pair
        ]
    want = run(exact, hidden.detach().float().requires_grad_(), wide)
    found = run(FusedAttention(theirs), hidden, given)
    rough = run(theirs, hidden, given)
    for ours, other, truth in zip(found, rough, want, strict=True):
        assert ours.dtype == torch.bfloat16
        assert 0 < (ours - truth).norm() <= 1.5 * (other - truth).norm()


def model_rope(given):
    return given["position_embeddings"]


def test_one_product_where_weights_are_adjacent(tiny_models, family):
    path = tiny_models(family)
    attention = served(path).layers[0].self_attn
    projection = Projection.of(attention)
    ((weight, bias),) = projection.maps
    assert weight.data_ptr() == attention.q_proj.weight.data_ptr()
    rows = [getattr(attention, f"{side}_proj") for side in "qkv"]
    assert torch.equal(weight, torch.cat([linear.weight for linear in rows]))
    if attention.q_proj.bias is not None:
        assert bias.data_ptr() == attention.q_proj.bias.data_ptr()
        assert torch.equal(bias, torch.cat([linear.bias for linear in rows]))
    # two of them change places, and the files' own order is another one, too
    attention.k_proj, attention.v_proj = attention.v_proj, attention.k_proj
    mapped = AdapterModel.from_checkpoint(path).layers[0].self_attn
    for apart in (attention, mapped):
        maps = Projection.of(apart).maps
        rows = [getattr(apart, f"{side}_proj").weight.data_ptr() for side in "qkv"]
        assert [weight.data_ptr() for weight, _ in maps] == rows


def test_three_products_give_the_same(tiny_models, family):
    path = tiny_models(family)
    mapped = AdapterModel.from_checkpoint(path).layers[0].self_attn
    model = AdapterModel.from_served(*vllm_tensors(path))
    hidden, given = arguments(model, 0, torch.float32, "causal")
    want = run(model.layers[0].self_attn, hidden, given)
    found = run(FusedAttention(mapped), hidden, given)
    units = 2 * model.config.hidden_size + mapped.head_dim + LENGTH
    for ours, other in zip(found, want, strict=True):
        assert (ours - other).norm() <= units * EPS * other.norm()


def test_one_row_sees_all_that_is_cached(tiny_models, family):
    """Without a mask a single query is not cut off from the keys before it."""
    model = served(tiny_models(family))
    hidden, given = arguments(model, 1, torch.float32, "cached")
    last = hidden[:, -1:].detach().requires_grad_()
    rope = [table[:, -1:] for table in given["position_embeddings"]]
    given |= {"position_embeddings": rope, "attention_mask": None}
    theirs = model.layers[1].self_attn
    want = run(theirs, last, given)
    found = run(FusedAttention(theirs), last, given)
    units = 2 * model.config.hidden_size + theirs.head_dim + BEFORE + 1
    for ours, other in zip(found, want, strict=True):
        assert (ours - other).norm() <= units * EPS * other.norm()


@pytest.mark.parametrize("fused", [False, True])
def test_packed_texts_are_each_alone(tiny_models, family, fused):
    """By as many roundings as in `test_float32_equals_transformers`, for each text."""
    model = served(tiny_models(family))
    attention = model.layers[2].self_attn
    attention = FusedAttention(attention) if fused else attention
    hidden, given = arguments(model, 2, torch.float32, "packed and windowed")
    units = 2 * model.config.hidden_size + attention.o_proj.in_features + LENGTH
    together, start = run(attention, hidden, given)[0], 0
    for length in LENGTHS:
        own = hidden[:, start : start + length].detach()
        mask = causal_mask(length, WINDOW, torch.device("cpu"))
        rope = model.shared(own, torch.arange(length)[None], mask).rope
        alone, _ = attention(own, position_embeddings=rope, attention_mask=mask)
        ours = together[:, start : start + length]
        assert (ours - alone).norm() <= units * EPS * alone.norm()
        start += length
