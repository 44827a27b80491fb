# SPDX-License-Identifier: Apache-2.0
"""The kernels of recall compile for Hopper GPUs, without one."""

import pytest

pytest.importorskip("triton")

from moe_tta.kernels import recall_triton
from moe_tta.kernels.recall_mean import mean_tokens
from moe_tta.kernels.recall_search import search_tokens
from tests.kernels.hopper import compile_for_hopper

SIZES = {
    "CAPACITY": recall_triton.LISTS,
    "MAX_SPLITS": 264,
    "ROWS": recall_triton.ROWS,
    "BLOCK_N": recall_triton.BLOCK_N,
    "WIDTH": 64,
}
SEARCH = {**SIZES, "PLACES": 2, "H": 2048, "BLOCK_H": recall_triton.BLOCK_H}
MEAN = {
    **SIZES,
    "E": 64,
    "BLOCK_C": recall_triton.BLOCK_C,
    "BLOCK_E": recall_triton.BLOCK_E,
}
POINTERS = {
    "asking_ptr": "i32",
    "slots_ptr": "i32",
    "plans_ptr": "u8",
    "keys_ptr": "fp32",
    "inverse_lengths_ptr": "fp64",
    "starts_ptr": "i64",
    "lists_ptr": "i64",
    "values_ptr": "fp32",
    "target_ptr": "fp32",
    "mix_ptr": "fp32",
}


@pytest.mark.parametrize(
    ("kernel", "constants", "hidden"),
    [
        (search_tokens, SEARCH, "bf16"),
        (search_tokens, SEARCH, "fp32"),
        (mean_tokens, MEAN, "fp32"),
    ],
    ids=str,
)
def test_compiles_for_sm_90(kernel, constants, hidden):
    types = POINTERS | {"hidden_ptr": hidden}
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": False}
    done = compile_for_hopper(kernel, constants, types, options)
    assert done.metadata.shared <= 100 * 2**10  # two programs on an SM of 228 KiB
    assert "fma.rn.f64" not in done.asm["ptx"]  # products in tensor cores
    assert (".f64.f64.f64.f64" in done.asm["ptx"]) == (kernel is search_tokens)
