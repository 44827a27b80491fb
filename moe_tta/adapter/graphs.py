# SPDX-License-Identifier: Apache-2.0
"""Passes captured as CUDA graphs, kept by the size of what they read.

A pass over a short text waits for Python to launch thousands of kernels. Captured once,
it is launched as a whole whenever a text of that size comes again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

Tensors = tuple[torch.Tensor, ...]
# reads nothing that changes but its arguments, and waits for no value on the device
Pass = Callable[..., Tensors]

CAPACITY = 12  # graphs that are kept
TAILS = 8  # about how many lowest layers differ


class Captured(Protocol):
    """A pass with inputs of its own."""

    def __call__(self, inputs: Tensors) -> Tensors:
        """Run it on other values of the same shapes.

        Its outputs hold until the next pass of any size.
        """


class Passes:
    """Passes run as they are.

    Attributes:
        multiple: What the length of texts is padded to a multiple of.
    """

    multiple = 1

    def call(self, size: Hashable, run: Pass, inputs: Tensors) -> Tensors:
        """Return what `run` gives for the inputs.

        Args:
            size: All that decides which kernels run, shapes of the inputs included.
            run: The pass; equal for equal sizes.
            inputs: Its arguments.

        Returns:
            What holds until the next pass.
        """
        return run(*inputs)

    def lowest(self, layer: int, count: int) -> int:
        """Return where a tail begins that shall reach down to `layer` of `count`."""
        return layer


class Graphs(Passes):
    """Passes by graphs; the first of a size runs as it is, to warm up.

    Sizes are rounded, so that they come again: texts to 64 tokens, tails to an eighth
    of the layers.

    Args:
        capture: Captures a pass with the shapes of its inputs.
        capacity: How many are kept; which was used longest ago goes first.
    """

    multiple = 64

    def __init__(
        self,
        capture: Callable[[Pass, Tensors], Captured],
        capacity: int = CAPACITY,
    ):
        self._capture, self._capacity = capture, capacity
        # `None` where a size was seen once
        self._kept: OrderedDict[Hashable, Captured | None] = OrderedDict()

    def __len__(self) -> int:
        return sum(captured is not None for captured in self._kept.values())

    def call(self, size: Hashable, run: Pass, inputs: Tensors) -> Tensors:
        """Do so by a graph, if one was captured.

        Raises:
            torch.OutOfMemoryError: all graphs are let go of.
        """
        try:
            return self._call(size, run, inputs)
        except torch.OutOfMemoryError:
            self._kept.clear()
            raise

    def lowest(self, layer: int, count: int) -> int:
        """Return where a tail begins that shall reach down to `layer` of `count`."""
        return layer - layer % max(1, count // TAILS)

    def _call(self, size: Hashable, run: Pass, inputs: Tensors) -> Tensors:
        known = size in self._kept
        captured = self._kept.pop(size, None)
        if known and captured is None:
            captured = self._capture(run, inputs)
        self._kept[size] = captured
        if len(self._kept) > self._capacity:
            self._kept.popitem(last=False)
        return run(*inputs) if captured is None else captured(inputs)


class CudaCapture:
    """Captures passes on a stream of its own, into one pool of memory.

    They share the pool because they run one after the other: it is as large as the
    largest of them, and stays reserved.
    """

    def __init__(self):
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()

    def __call__(self, run: Pass, inputs: Tensors) -> Captured:
        """Capture a pass that has run before with these shapes."""
        own = tuple(tensor.clone() for tensor in inputs)
        graph = torch.cuda.CUDAGraph()
        # other threads of a worker copy results meanwhile
        with torch.cuda.graph(
            graph, self._pool, self._stream, capture_error_mode="thread_local"
        ):
            outputs = run(*own)

        def replay(inputs: Tensors) -> Tensors:
            for mine, given in zip(own, inputs, strict=True):
                mine.copy_(given)
            graph.replay()
            return outputs

        return replay
