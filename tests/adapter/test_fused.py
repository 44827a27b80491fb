# SPDX-License-Identifier: Apache-2.0
"""What GPUs run in bfloat16, on a CPU: grouped products of experts, fused norms."""

from types import SimpleNamespace

import pytest
import torch

from moe_tta.adapter import AdapterError, AdapterModel
from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.fused import fuse
from moe_tta.adapter.grouped import GroupedExperts
from tests.adapter import independent
from tests.adapter.layouts import vllm_tensors
from tests.adapter.test_gradient import relative, size, tail_of


@pytest.mark.parametrize("lengths", [(20,), (20, 7, 40)], ids=str)
def test_float32_agrees_with_the_loop(tiny_models, family, draw, lengths):
    served = AdapterModel.from_served(*vllm_tensors(tiny_models(family)))
    delta = 0.3 * draw.normal(len(lengths), *size(served))
    texts = [draw.tokens(length) for length in lengths]
    loop = autograd_gradient(tail_of(served, texts, delta).loss)(delta)
    before = {name: weight.data_ptr() for name, weight in served.weights()}
    fuse(served.lm)
    assert {name: weight.data_ptr() for name, weight in served.weights()} == before
    assert isinstance(served.layers[0].mlp.experts, GroupedExperts)
    kinds = {type(module).__name__ for module in served.lm.modules()}
    assert not any(name.endswith("RMSNorm") for name in kinds)
    fused = autograd_gradient(tail_of(served, texts, delta).loss)(delta)
    assert relative(fused[0], loop[0]) <= 1e-5
    assert relative(fused[1], loop[1]) <= 1e-5


def test_other_activations_are_refused():
    experts = SimpleNamespace(act_fn=torch.nn.GELU())
    with pytest.raises(AdapterError, match="compute SiLU, not GELU"):
        GroupedExperts(experts)


def test_bfloat16_is_as_near_as_transformers(tiny_models, family, draw):
    """Both round everywhere, and take other experts near ties: summed over texts."""
    path = tiny_models(family)
    config, tensors = vllm_tensors(path)
    halves = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    ours = AdapterModel.from_served(config, halves)
    fuse(ours.lm)
    exact = independent.load(path)
    theirs = independent.load(path, torch.bfloat16)
    missed = {"ours": 0.0, "theirs": 0.0}
    for _ in range(6):
        delta, tokens = 0.3 * draw.normal(*size(ours)), draw.tokens(40)
        _, want = independent.context_gradient(exact, tokens, delta)
        _, rough = independent.context_gradient(theirs, tokens, delta)
        loss = tail_of(ours, [tokens], delta[None]).loss
        _, found = autograd_gradient(loss)(delta[None])
        missed["ours"] += float((found[0] - want).norm())
        missed["theirs"] += float((rough - want).norm())
    assert 0 < missed["ours"] <= 2 * missed["theirs"]
