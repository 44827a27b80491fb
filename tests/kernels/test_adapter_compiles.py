# SPDX-License-Identifier: Apache-2.0
"""The adapter's kernels compile for Hopper GPUs, without one."""

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_tta.kernels import biased_topk, pairs_order, pairs_triton

BF16 = torch.bfloat16
TYPES = {
    **dict.fromkeys(("rows", "spread", "total"), "bf16"),
    **dict.fromkeys(("gate_up", "product", "slope", "grad_gate_up"), "bf16"),
    **dict.fromkeys(("logits", "grad_logits"), "bf16"),
    **dict.fromkeys(("weights", "grad_weights", "bias", "grad"), "fp32"),
    **dict.fromkeys(("shifted", "values", "sums"), "fp32"),
    **dict.fromkeys(("ids", "slots"), "i64"),
    **dict.fromkeys(("counts", "places", "pairs", "ends"), "i32"),
}
ROUTING = 64, 8, False, True, 1024, BF16, torch.int64, True
# OLMoE's sizes; the last column is how many accesses of 16 bytes there are at least
KERNELS = {
    "count": (pairs_order._count, (64, torch.int64), 0),
    "place": (pairs_order._place, (64, torch.int64), 4),
    "spread": (pairs_triton._spread, (2048, 8, BF16), 9),
    "sum": (pairs_triton._sum, (2048, 8, BF16, True), 9),
    "activate": (pairs_triton._activate, (1024, BF16), 3),
    "backward": (pairs_triton._activate_backward, (1024, BF16, True), 5),
    "route": (biased_topk._forward, ROUTING, 1),
    "slopes": (biased_topk._backward, ROUTING, 2),
    "slots": (biased_topk._sum_slots, (64, torch.int64), 4),
}


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm_90(name):
    launcher, kind, wide = KERNELS[name]
    kernel, options = launcher._kernel, launcher._constants(*kind)
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton was imported to interpret")
    names = kernel.arg_names
    constants = {key: options.pop(key) for key in names if key in options}
    types = {**TYPES, "pairs": "bf16"} if name == "sum" else TYPES
    signature = {
        key: "constexpr"
        if key in constants
        else f"*{types[key.removesuffix('_ptr')]}"
        if key.endswith("_ptr")
        else "i32"
        for key in names
    }
    pointers = [index for index, key in enumerate(names) if key.endswith("_ptr")]
    aligned = {(index,): [["tt.divisibility", 16]] for index in pointers}
    values = {(names.index(key),): value for key, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert done.asm["ptx"].count(".v4.b32") >= wide
    assert done.asm["ptx"].count("atom") == 0
