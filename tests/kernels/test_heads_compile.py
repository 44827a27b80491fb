# SPDX-License-Identifier: Apache-2.0
"""Kernels of attention's heads and of the loss compile for sm_90, in wide accesses."""

import re
from collections import defaultdict

import pytest

pytest.importorskip("triton")

from moe_tta.kernels import rope_triton, token_loss_triton
from moe_tta.kernels.rope import HeadLayout
from tests.kernels.hopper import compile_for_hopper

TYPES = defaultdict(lambda: "bf16", targets_ptr="i64", nll_ptr="fp32")
OLMOE = HeadLayout(16, 16, 128, False, 1e-5)
MIXTRAL = HeadLayout(32, 8, 128)
QWEN3_MOE = HeadLayout(32, 4, 128, True, 1e-6)
CASES = {
    f"{name} {side}": (kernel, constants)
    for name, layout in (("olmoe", OLMOE), ("mixtral", MIXTRAL), ("qwen3", QWEN3_MOE))
    for side, kernel, constants in (
        ("on", rope_triton._turn, rope_triton._turn_constants(layout, 8192)),
        ("back", rope_triton._turn_back, rope_triton._back_constants(layout)),
    )
} | {
    f"loss {vocab} {slopes}": (
        token_loss_triton._score_rows,
        token_loss_triton._constants(vocab, -(-vocab // 8) * 8, slopes),
    )
    for vocab, slopes in ((50304, True), (50304, False), (32003, True))
}


@pytest.mark.parametrize("case", CASES)
def test_compiles_for_sm_90(case):
    kernel, given = CASES[case]
    constants = dict(given)
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    done = compile_for_hopper(kernel, constants, TYPES, options)
    assert done.metadata.shared <= 4 * 2**10
    ptx = done.asm["ptx"]
    assert ".local" not in ptx
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 4
    assert not re.search(r"\b(atom|red)\.", ptx)  # sums in a fixed order
