# SPDX-License-Identifier: Apache-2.0
"""Kernels of attention's heads and of the loss compile for sm_90, in wide accesses."""

import re

import pytest

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_tta.kernels import rope_triton, token_loss_triton
from moe_tta.kernels.rope import HeadLayout

OTHERS = {"targets_ptr": "i64", "nll_ptr": "fp32"}
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
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton was imported to interpret")
    constants = dict(given)
    options = {name: constants.pop(name) for name in ("num_warps", "enable_fp_fusion")}
    signature, aligned, values = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in constants else "i32"
        if name in constants:
            values[index,] = constants[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{OTHERS.get(name, 'bf16')}"
            aligned[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, aligned)
    done = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert done.metadata.shared <= 4 * 2**10
    ptx = done.asm["ptx"]
    assert ".local" not in ptx
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= 4
    assert not re.search(r"\b(atom|red)\.", ptx)  # sums in a fixed order
