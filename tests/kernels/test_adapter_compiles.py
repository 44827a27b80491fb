# SPDX-License-Identifier: Apache-2.0
"""The adapter's kernels compile for Hopper GPUs, without one."""

import pytest
import torch

pytest.importorskip("triton")

from moe_tta.kernels import biased_topk, pairs_order, pairs_triton
from tests.kernels.hopper import compile_for_hopper

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
OPTIONS = "num_warps", "enable_fp_fusion"
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
    constants = launcher._constants(*kind)
    options = {key: constants.pop(key) for key in OPTIONS if key in constants}
    types = {f"{key}_ptr": one for key, one in TYPES.items()}
    if name == "sum":
        types["pairs_ptr"] = "bf16"
    done = compile_for_hopper(launcher._kernel, constants, types, options)
    assert done.asm["ptx"].count(".v4.b32") >= wide
    assert done.asm["ptx"].count("atom") == 0
