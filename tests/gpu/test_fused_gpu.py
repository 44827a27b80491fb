# SPDX-License-Identifier: Apache-2.0
"""Attention and loss of the adapter on a GPU, in bfloat16 and in published sizes.

Needs torch, Triton and transformers, no vLLM; about a minute on an H200. What errs is
compared with what transformers' own modules err, both from float32 on the same inputs.
"""

import copy
import logging
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import MixtralConfig, OlmoeConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralAttention
from transformers.models.olmoe.modeling_olmoe import (
    OlmoeAttention,
    OlmoeRotaryEmbedding,
)
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeAttention
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeAttention

from moe_tta.adapter.attention import FusedAttention, Projection
from moe_tta.adapter.contexts import causal_mask
from moe_tta.adapter.head import CHUNK, FusedHead
from moe_tta.adapter.packed_attention import PACKED_SDPA
from moe_tta.adapter.packing import PackedTexts

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
log = logging.getLogger(__name__)
DEVICE, HALF = torch.device("cuda"), torch.bfloat16
ROWS, LENGTH, BEFORE, WINDOW = 8, 328, 40, 100
COUNT, WIDTH, VOCAB = 2616, 2048, 50304  # tokens, OLMoE's H and V
CASES = {
    "olmoe": (OlmoeAttention, OlmoeConfig, 2048, 16, 16, {}),
    "mixtral": (MixtralAttention, MixtralConfig, 4096, 32, 8, {}),
    "qwen2_moe": (Qwen2MoeAttention, Qwen2MoeConfig, 2048, 16, 16, {}),
    "qwen3_moe": (Qwen3MoeAttention, Qwen3MoeConfig, 2048, 32, 4, {"head_dim": 128}),
}
PACKED = 2112  # rows of texts of 328, 308, ... tokens, and of nobody
PASSES = ("causal", "windowed", "cached", "packed", "packed and windowed")


def make_attention(name):
    """Return transformers' attention in bfloat16, q, k and v rows of one tensor."""
    module, config, hidden, queries, keys, more = CASES[name]
    torch.manual_seed(0)
    config = config(
        hidden_size=hidden,
        num_attention_heads=queries,
        num_key_value_heads=keys,
        attn_implementation=PACKED_SDPA,
        **more,
    )
    attention = module(config, 0).to(DEVICE, HALF).eval().requires_grad_(False)
    for parameter in attention.parameters():
        spread = hidden**-0.5 if parameter.dim() == 2 else 0.5
        parameter.normal_(float("norm" in name), spread)
    for part in ("weight", "bias"):
        linears = [getattr(attention, f"{side}_proj") for side in "qkv"]
        if getattr(linears[0], part) is None:
            continue
        joint = torch.cat([getattr(linear, part).data for linear in linears])
        sizes = [linear.out_features for linear in linears]
        for linear, rows in zip(linears, joint.split(sizes), strict=True):
            getattr(linear, part).data = rows
    assert len(Projection.of(attention).maps) == 1
    return attention


class Before:
    """Keys and values that stand before those of a pass."""

    def __init__(self, attention):
        heads = attention.config.num_key_value_heads
        shape = 2, ROWS, heads, BEFORE, attention.head_dim
        self.pair = torch.randn(shape, device=DEVICE).to(HALF)

    def update(self, keys, values, layer):
        old_keys, old_values = self.pair.to(keys.dtype)
        return torch.cat([old_keys, keys], 2), torch.cat([old_values, values], 2)


def arguments(attention, which):
    shape = ROWS, LENGTH, attention.config.hidden_size
    positions = torch.arange(LENGTH, device=DEVICE)[None]
    mask = cache = packing = None
    if "packed" in which:
        texts = [[2] * (LENGTH - 20 * row) for row in range(ROWS)]
        texts = PackedTexts.of(texts, DEVICE, extent=(PACKED, LENGTH))
        shape = 1, PACKED, attention.config.hidden_size
        positions, packing = texts.positions, texts.packing
    hidden = torch.randn(shape, device=DEVICE).to(HALF).requires_grad_()
    if "windowed" in which:
        mask = causal_mask(LENGTH, WINDOW, DEVICE)
    if which == "cached":
        shift = BEFORE - torch.arange(ROWS, device=DEVICE)[:, None] % 3
        positions, cache = positions + shift, Before(attention)
        mask = torch.ones(ROWS, 1, LENGTH, BEFORE + LENGTH, dtype=torch.bool)
        mask = mask.to(DEVICE).tril(BEFORE)
    head = copy.copy(attention.config)
    head.head_dim = attention.head_dim
    with DEVICE:
        rope = OlmoeRotaryEmbedding(head)
    tables = rope(hidden, positions)
    return hidden, {
        "position_embeddings": tables,
        "attention_mask": mask,
        "past_key_values": cache,
        "packing": packing,
    }


def run(attention, hidden, given):
    out, _ = attention(hidden_states=hidden, **given)
    generator = torch.Generator(DEVICE).manual_seed(8)
    grad = torch.randn(out.shape, generator=generator, device=DEVICE).to(HALF)
    return out.detach(), *torch.autograd.grad(out, hidden, grad.to(out.dtype))


@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("name", CASES)
def test_attention_is_as_near_as_transformers(name, which):
    theirs = make_attention(name)
    hidden, given = arguments(theirs, which)
    exact = copy.deepcopy(theirs).float()
    wide = {**given, "position_embeddings": [t.float() for t in rope_of(given)]}
    want = run(exact, hidden.detach().float().requires_grad_(), wide)
    found = run(FusedAttention(theirs), hidden, given)
    rough = run(theirs, hidden, given)
    for ours, other, truth in zip(found, rough, want, strict=True):
        missed = [float((x - truth).norm() / truth.norm()) for x in (ours, other)]
        log.info("%s %s: ours %.2e, transformers %.2e", name, which, *missed)
        assert 0 < missed[0] <= 1.5 * missed[1]


def rope_of(given):
    return given["position_embeddings"]


def make_head():
    torch.manual_seed(1)
    linear = nn.Linear(WIDTH, VOCAB, bias=False, device=DEVICE, dtype=HALF)
    linear.requires_grad_(False).weight.normal_(0, 3 * WIDTH**-0.5)
    rows = torch.randn(COUNT, WIDTH, device=DEVICE).to(HALF).requires_grad_()
    targets = torch.randint(0, VOCAB, (COUNT,), device=DEVICE)
    factors = torch.rand(COUNT, device=DEVICE)
    return linear, rows, targets, factors


def test_loss_is_as_near_as_the_plain_one():
    linear, rows, targets, factors = make_head()
    leaf = rows.detach().double().requires_grad_()
    exact = functional.linear(leaf, linear.weight.double())
    truth = functional.cross_entropy(exact, targets, reduction="none")
    (want,) = torch.autograd.grad(truth, leaf, factors.double())
    truth = truth.detach()
    plain = functional.cross_entropy(linear(rows).float(), targets, reduction="none")
    found = FusedHead(linear).nll(rows, targets)
    missed = []
    for values in (found, plain):
        (slope,) = torch.autograd.grad(values, rows, factors)
        errors = values.detach() - truth, slope - want
        missed.append([float(error.norm()) for error in errors])
    log.info("loss, slope: ours %.2e, %.2e; plain %.2e, %.2e", *missed[0], *missed[1])
    for ours, theirs in zip(*missed, strict=True):
        assert 0 < ours <= 1.5 * theirs


def test_loss_makes_logits_of_one_chunk_and_no_more():
    linear, rows, targets, factors = make_head()
    fused = FusedHead(linear)
    torch.autograd.grad(fused.nll(rows, targets), rows, factors)  # workspaces
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    slope = torch.autograd.grad(fused.nll(rows, targets), rows, factors)
    made = torch.cuda.max_memory_allocated() - before
    assert len(slope) == 1
    # slopes kept and returned, values, and the allocator's steps of 2 MiB
    assert made <= CHUNK * VOCAB * 2 + 2 * rows.nbytes + 4 * COUNT + 4 * 2**21


def step(attention, head, hidden, tables, targets, factors):
    """One forward and backward of both, from hidden states to their gradient."""
    out, _ = attention(hidden_states=hidden, position_embeddings=tables)
    values = head.nll(out.flatten(0, 1), targets)
    return values, *torch.autograd.grad(values, hidden, factors)


def make_step():
    theirs = make_attention("olmoe")
    hidden, given = arguments(theirs, "causal")
    linear, *_ = make_head()
    count = ROWS * LENGTH
    targets = torch.randint(0, VOCAB, (count,), device=DEVICE)
    factors = torch.rand(count, device=DEVICE)
    attention, head = FusedAttention(theirs), FusedHead(linear)
    return attention, head, hidden, rope_of(given), targets, factors


def test_a_captured_graph_gives_the_same():
    """Up to the order in which torch's attention sums the gradient of queries."""
    given = make_step()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(2):
            step(*given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*given)
    with torch.no_grad():
        given[2].copy_(given[2].flip(0))
    graph.replay()
    values, slope = step(*given)
    assert torch.equal(captured[0], values)
    error = (captured[1].float() - slope.float()).norm()
    assert error <= 2**-8 * slope.float().norm()


def kernels(function):
    """Return the names of the kernels that a call launches, with counts."""
    function()
    torch.cuda.synchronize()
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CUDA]
    ) as seen:
        function()
        torch.cuda.synchronize()
    events = [e for e in seen.events() if e.device_type.name == "CUDA"]
    return Counter(e.name for e in events)


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_copied_around_attention(name):
    theirs = make_attention(name)
    hidden, given = arguments(theirs, "causal")
    attention = FusedAttention(theirs)
    out, _ = attention(hidden_states=hidden, **given)
    grad = torch.randn_like(out)
    forward = kernels(lambda: attention(hidden_states=hidden, **given))
    back = kernels(lambda: torch.autograd.grad(out, hidden, grad, retain_graph=True))
    both = Counter(forward) + Counter(back)
    log.info("%s: forward %s", name, dict(forward))
    log.info("%s: backward %s", name, dict(back))
    assert forward["_turn"] == back["_turn_back"] == 1
    assert not any("CatArray" in kernel for kernel in both)
    assert not any("copy" in kernel.lower() for kernel in forward)


def test_launches_of_the_loss():
    linear, rows, targets, factors = make_head()
    fused = FusedHead(linear)
    values = fused.nll(rows, targets)
    forward = kernels(lambda: fused.nll(rows, targets))
    back = kernels(
        lambda: torch.autograd.grad(values, rows, factors, retain_graph=True)
    )
    log.info("loss: forward %s, backward %s", dict(forward), dict(back))
    assert forward["_score_rows"] == -(-COUNT // CHUNK)
    assert sum(back.values()) == 1
