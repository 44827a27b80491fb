# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the adapter's kernels at the sizes of real layers, and in CUDA graphs.

Needs one CUDA device and no vLLM. `tests/kernels/triton_experts.py` and
`triton_topk.py` ask the same of small sizes.
"""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from moe_tta.kernels.biased_topk import biased_topk
from moe_tta.kernels.grouped import grouped_experts
from moe_tta.kernels.pairs_triton import TRITON
from tests.kernels import expert_checks as checks
from tests.kernels import topk_checks

BF16 = torch.bfloat16
# eight texts of 328 tokens; rows, H, I, experts, experts of a row
OLMOE = 2624, 2048, 1024, 64, 8
QWEN3 = 2624, 2048, 768, 128, 8
QWEN2 = 2624, 2048, 1408, 60, 4
MIXTRAL = 328, 4096, 14336, 8, 2
LAYERS = pytest.mark.parametrize(
    "layer", [OLMOE, QWEN3, QWEN2, MIXTRAL], ids=["olmoe", "qwen3", "qwen2", "mixtral"]
)


@pytest.fixture(autouse=True)
def poison():
    """Make fresh outputs NaN and the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@LAYERS
def test_order(layer):
    rows, _, _, experts, width = layer
    ids = checks.draw_ids(rows, experts, width)
    checks.check_order(TRITON, ids, experts, "cuda")


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_sums(layer, dtype):
    rows, hidden, _, experts, width = layer
    ids = checks.draw_ids(rows, experts, width)
    checks.check_sums(TRITON, ids, experts, hidden, dtype, "cuda")


@LAYERS
def test_products(layer):
    rows, hidden, inner, experts, width = layer
    ids = checks.draw_ids(rows, experts, width)
    checks.check_products(TRITON, ids, hidden, 2 * inner, BF16, "cuda")


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_activation(layer, dtype):
    rows, _, inner, experts, width = layer
    ids = checks.draw_ids(rows, experts, width)
    checks.check_activation(TRITON, ids, experts, inner, dtype, "cuda")


@LAYERS
def test_layer(layer):
    checks.check_layer(TRITON, *layer, dtype=BF16, device="cuda")


@LAYERS
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
@pytest.mark.parametrize("renormalize", [True, False], ids=["renormalised", "as is"])
def test_routing(layer, dtype, renormalize):
    rows, _, _, experts, width = layer
    shape, rule = topk_checks.make_rule(experts, width, renormalize)
    logits = (3 * checks.draw(rows, experts)).to(dtype)
    slots = torch.arange(rows) // (rows // 8) % 9  # eight runs; what is left over, 0
    bias = checks.draw(8, 16, experts, seed=2)[:, 3]
    topk_checks.check(shape, rule, logits, slots, bias, "cuda")


def step(rule, gate, slots, matrices, rows, bias):
    """Route and compute a layer, and take the gradient of rows and vectors."""
    with torch.enable_grad():
        rows, bias = rows.detach().requires_grad_(), bias.detach().requires_grad_()
        weights, ids = biased_topk(rows @ gate.T, rule, slots, bias)
        output = grouped_experts(rows, ids, weights, *matrices, TRITON)
        return output.detach(), *torch.autograd.grad(
            output.float().square().mean(), (rows, bias)
        )


def olmoe_step():
    """Return a step at OLMoE's size, and its rows and vectors."""
    num_rows, hidden, _, num_experts, width = OLMOE
    rows, _, _, *matrices = checks.draw_layer(*OLMOE, BF16, "cuda")
    gate = checks.draw(num_experts, hidden, seed=3).to("cuda", BF16) / hidden**0.5
    _, rule = topk_checks.make_rule(num_experts, width, False)
    slots = 1 + torch.arange(num_rows, device="cuda") // 328
    bias = checks.draw(8, num_experts, seed=2).cuda()

    def take(rows, bias):
        return step(rule, gate, slots, matrices, rows, bias)

    return take, rows, bias


def test_a_step_waits_for_nothing():
    take, rows, bias = olmoe_step()
    wanted = take(rows, bias)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = take(rows, bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, wanted))


def test_a_captured_step_gives_the_same_bits():
    take, rows, bias = olmoe_step()
    others = torch.flip(rows, [0]), -bias
    wanted = take(rows, bias), take(*others)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        take(rows, bias)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        found = take(rows, bias)
    graph.replay()
    assert all(map(torch.equal, found, wanted[0]))
    rows.copy_(others[0])
    bias.copy_(others[1])
    graph.replay()
    assert all(map(torch.equal, found, wanted[1]))
