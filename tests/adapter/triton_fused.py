# SPDX-License-Identifier: Apache-2.0
"""Whole models by Triton kernels; `tests/kernels/test_triton.py` runs this.

Interpreted, in float32: on a GPU `tests/gpu` asks the same of engines in bfloat16.
"""

import pytest
import torch

from moe_tta.adapter import AdapterModel
from moe_tta.adapter.descent import autograd_gradient
from moe_tta.adapter.fused import fuse
from moe_tta.adapter.routing import AdaptedRouter, EditTables, LayerEdit
from moe_tta.kernels.pairs_triton import TRITON
from moe_tta.kernels.reference import Routing
from moe_tta.shape import RouterShape
from tests.adapter.layouts import vllm_tensors
from tests.adapter.test_gradient import relative, size, tail_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="interprets")


def test_gradients_are_the_loops(tiny_models, family, draw):
    served = AdapterModel.from_served(*vllm_tensors(tiny_models(family)))
    delta = 0.3 * draw.normal(2, *size(served))
    texts = [draw.tokens(4), draw.tokens(6)]
    loop = autograd_gradient(tail_of(served, texts, delta, starts=[2, 0]).loss)(delta)
    fuse(served.lm)
    for layer in served.layers:
        layer.mlp.experts.work = TRITON
        layer.mlp.gate.fuse()
    fused = autograd_gradient(tail_of(served, texts, delta, starts=[2, 0]).loss)(delta)
    assert relative(fused[0], loop[0]) <= 1e-5
    assert relative(fused[1], loop[1]) <= 1e-5


@pytest.fixture(params=[True, False], ids=["renormalised", "as they are"])
def routers(request, draw):
    shape = RouterShape((0,), 1, 12, 3, 3, renormalize=request.param)
    weight = torch.nn.Parameter(draw.normal(12, 8), requires_grad=False)
    tables = EditTables(shape, torch.device("cpu"))
    law, fused = (AdaptedRouter(weight, shape, tables) for _ in range(2))
    fused.fuse()
    return law, fused


@pytest.mark.parametrize("kind", ["none", "bias", "target"])
def test_a_fused_router_is_the_law(routers, draw, kind):
    rows, seen = draw.normal(40, 8), []
    bias, target = draw.normal(2, 12), torch.softmax(draw.normal(2, 12), dim=1)
    values = {"none": {}, "bias": {"bias": bias}, "target": {"target": target}}[kind]
    edit = LayerEdit(torch.arange(40) % 3, **values) if values else None
    results = []
    for router in routers:
        router.edit = edit
        router.observe = lambda logits, chosen: seen.append((logits, chosen))
        results.append(router(rows))
    (law_logits, law_weights, law_ids), (logits, weights, ids) = results
    assert torch.equal(logits, law_logits)
    assert ids.dtype == torch.int64
    assert torch.equal(ids, law_ids)
    torch.testing.assert_close(weights, law_weights)
    for (seen_logits, chosen), result in zip(seen, results, strict=True):
        assert torch.equal(seen_logits, result[0])
        assert isinstance(chosen, Routing)
        assert torch.equal(chosen.topk_weights, result[1])
        assert chosen.topk_ids.dtype == torch.int32
        assert torch.equal(chosen.topk_ids, result[2].int())
