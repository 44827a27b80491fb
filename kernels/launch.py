# SPDX-License-Identifier: Apache-2.0
"""Launch a Triton kernel by its compiled form, in a third of Triton's own time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton


def is_nvidia(device: torch.device) -> bool:
    """Return whether kernels may hold PTX there."""
    return device.type == "cuda" and torch.version.hip is None


def can_overlap(kernel: Any, device: torch.device) -> bool:
    """Return whether a kernel's launch may begin before the one it follows ends.

    NVIDIA GPUs of compute capability 9.0 and above do that, with compiled kernels.
    Such a kernel is launched with `launch_pdl` and calls `gdc_wait` before it touches
    what others read or write. It begins early only if the launch before it is done
    with some multiprocessor, or says so itself.
    """
    compiled = isinstance(kernel, triton.JITFunction)
    return (
        compiled
        and is_nvidia(device)
        and torch.cuda.get_device_capability(device) >= (9, 0)
    )


class Launcher:
    """One kernel and what it was compiled to.

    Triton compiles anew for other types, alignments and integers, and looks all of
    them up in each launch. Here the caller names once what may differ; addresses stand
    for tensors, so that the driver is not asked whose memory each of them is.

    Args:
        kernel: A `triton.jit` function: pointers first, then integers, then constexprs.
        constants: Returns the constexprs by name, and Triton's options (`num_warps`,
            ...), of a `kind`.
    """

    def __init__(self, kernel: Any, constants: Callable[..., dict[str, Any]]):
        self._kernel = kernel
        self._constants = constants
        self._compiled: dict[tuple, tuple[Any, tuple]] = {}

    def __call__(
        self,
        grid: tuple[int, int, int],
        tensors: tuple[torch.Tensor, ...],
        numbers: tuple[int, ...],
        kind: tuple,
    ) -> None:
        """Launch on the current stream.

        Args:
            grid: Programs in each dimension.
            tensors: What the pointers point to.
            numbers: The integers.
            kind: Hashable; two calls of one kind have the same types, the same
                integers where the kernel is specialised to them, and the same
                constants.
        """
        pointers = [tensor.data_ptr() for tensor in tensors]
        key = (kind, *[pointer & 15 for pointer in pointers])
        found = self._compiled.get(key)
        if found is not None:
            compiled, constants = found
            compiled[grid](*pointers, *numbers, *constants)
            return
        constants = self._constants(*kind)
        compiled = self._kernel[grid](*tensors, *numbers, **constants)
        if compiled is not None:  # it is where kernels are interpreted
            names = self._kernel.arg_names[len(tensors) + len(numbers) :]
            ordered = tuple(constants[name] for name in names)
            self._compiled[key] = compiled, ordered
