# SPDX-License-Identifier: Apache-2.0
"""The adapter's kernels compile for Hopper GPUs, without one."""

import re

import pytest
import torch

pytest.importorskip("triton")

from moe_tta.kernels import (
    biased_topk,
    grouped_triton,
    pairs_order,
    pairs_triton,
    take_rows_triton,
)
from tests.kernels.hopper import compile_for_hopper

BF16 = torch.bfloat16
TYPES = {
    **dict.fromkeys(("x", "weight", "total", "rows", "taken"), "bf16"),
    **dict.fromkeys(("gate_up", "product", "slope", "grad_gate_up"), "bf16"),
    **dict.fromkeys(("logits", "grad_logits"), "bf16"),
    **dict.fromkeys(("weights", "grad_weights", "bias", "grad"), "fp32"),
    **dict.fromkeys(("shifted", "values", "sums"), "fp32"),
    **dict.fromkeys(("ids", "slots", "index"), "i64"),
    **dict.fromkeys(("counts", "places", "pairs", "ends"), "i32"),
}
OPTIONS = "num_warps", "num_stages", "enable_fp_fusion"
PRODUCT = 2048, 2048, 64, 8
ROUTING = 64, 8, False, True, 1024, BF16, torch.int64, True
# OLMoE's sizes; the last column is how many accesses of 16 bytes there are at least
KERNELS = {
    "count": (pairs_order._count, (64, torch.int64), 0),
    "place": (pairs_order._place, (64, torch.int64), 4),
    "gate_up": (grouped_triton._multiply, (*PRODUCT, True, True, BF16), 32),
    "down": (grouped_triton._multiply, (*PRODUCT, True, False, BF16), 32),
    "slope": (grouped_triton._multiply, (*PRODUCT, False, True, BF16), 32),
    "odd": (grouped_triton._multiply, (896, 4864, 8, 2, False, False, BF16), 32),
    "sum": (pairs_triton._sum, (2048, 8, BF16, True), 9),
    "take": (take_rows_triton._take, (2048, 6144, BF16), 4),
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


@pytest.mark.parametrize("kind", [(True, True), (True, False), (False, False)])
def test_products_are_the_matrix_units(kind):
    """Two tiles, four products of 16 columns each; copies of 16 bytes, all of them."""
    constants = grouped_triton._constants(*PRODUCT, *kind, BF16)
    options = {key: constants.pop(key) for key in OPTIONS if key in constants}
    types = {f"{key}_ptr": one for key, one in TYPES.items()}
    kernel = grouped_triton._multiply_experts
    ptx = compile_for_hopper(kernel, constants, types, options).asm["ptx"]
    assert ptx.count("wgmma.mma_async") == 8
    copies = re.findall(r"cp\.async\.c[ag].*", ptx)
    assert len(copies) > 80
    assert all(re.search(r"\], 0x10", copy) for copy in copies)
