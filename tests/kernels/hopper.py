# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled for Hopper GPUs, without one."""

from collections.abc import Mapping
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def compile_for_hopper(
    kernel: Any,
    constants: Mapping[str, Any],
    types: Mapping[str, str],
    options: Mapping[str, Any],
    aligned: bool = True,
) -> Any:
    """Return a `triton.jit` function's compiled form; skip where it is interpreted.

    Args:
        kernel: The function.
        constants: Its constexprs by name.
        types: What each pointer points to, by name; other arguments are int32.
        options: Triton's.
        aligned: Whether pointers are multiples of 16 bytes.
    """
    if not isinstance(kernel, triton.JITFunction):
        pytest.skip("kernels are interpreted in this process")
    signature = dict.fromkeys(kernel.arg_names, "i32")
    values, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[index,] = "constexpr", constants[name]
        elif name.endswith("_ptr"):
            signature[name] = f"*{types[name]}"
            if aligned:
                attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    return triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options=dict(options)
    )
