# SPDX-License-Identifier: Apache-2.0
"""Passes captured as CUDA graphs, kept by the size of what they read.

A pass over a short text waits for Python to launch thousands of kernels. Captured once,
it is launched as a whole whenever a text of that size comes again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

Tensors = tuple[torch.Tensor, ...]
# reads nothing that changes but its arguments, and waits for no value on the device
Pass = Callable[..., Tensors]

MOST_ROWS = 3072  # of more, products keep an H200 busy while Python launches others
CAPACITY = 64  # graphs that are kept


class Size(NamedTuple):
    """All that decides which kernels a pass runs."""

    name: str
    texts: int  # R
    tokens: int  # T, to which attention pads each
    rows: int  # N, of all texts and of nobody
    first: int = 0  # layer that it begins with
    recompute: bool = False


class Captured(Protocol):
    """A pass with inputs of its own."""

    def __call__(self, inputs: Tensors) -> Tensors:
        """Run it on other values of the same shapes.

        Its outputs hold until the next pass of any size.
        """


class Passes:
    """Passes run as they are."""

    def extent(self, lengths: Sequence[int]) -> tuple[int, int]:
        """Return N rows for texts of these lengths, and T, attention's length."""
        return sum(lengths), max(lengths)

    def starts(self, rows: int, layers: int) -> range:
        """Return before which MoE layers a tail of N rows may begin, of so many."""
        return range(layers)

    def keep(self, hidden: torch.Tensor, place: int) -> torch.Tensor:
        """Return what holds hidden states [1, N, H] until the next pass that keeps.

        Args:
            hidden: Within a pass, before the layer `starts` has at `place`.
            place: From 0 on.
        """
        return hidden

    def call(self, size: Size, run: Pass, inputs: Tensors) -> Tensors:
        """Return what `run` gives for the inputs; it holds until the next pass.

        Args:
            size: Of the pass.
            run: The pass; the same for equal sizes.
            inputs: Its arguments.
        """
        return run(*inputs)


class Graphs(Passes):
    """Passes by graphs where they are small; the first of a size warms up.

    Their sizes are rounded up, so that they come again: one text to 32 tokens, the
    rows and the longest of several to 128, tails to an eighth of the layers.

    Args:
        capture: Captures a pass with the shapes of its inputs.
        capacity: How many are kept; which was used longest ago goes first.
        most_rows: Most rows, nobody's included, of a pass that is captured.
    """

    def __init__(
        self,
        capture: Callable[[Pass, Tensors], Captured],
        capacity: int = CAPACITY,
        most_rows: int = MOST_ROWS,
    ):
        self._capture, self._capacity = capture, capacity
        self._most_rows = most_rows
        # `None` where a size was seen once
        self._kept: OrderedDict[Size, Captured | None] = OrderedDict()
        self._rooms: dict[int, torch.Tensor] = {}

    def __len__(self) -> int:
        return sum(captured is not None for captured in self._kept.values())

    def extent(self, lengths: Sequence[int]) -> tuple[int, int]:
        """Return N rows for texts of these lengths, and T, attention's length."""
        exact = super().extent(lengths)
        multiple = 128 if len(lengths) > 1 else 32
        rows, length = (-(-size // multiple) * multiple for size in exact)
        return (rows, length) if rows <= self._most_rows else exact

    def starts(self, rows: int, layers: int) -> range:
        """Return before which MoE layers a tail of N rows may begin, of so many."""
        return range(0, layers, max(1, layers // 8) if rows <= self._most_rows else 1)

    def keep(self, hidden: torch.Tensor, place: int) -> torch.Tensor:
        """Hold hidden states where all graphs put those of this place."""
        rows = hidden.shape[1]
        if rows > self._most_rows:
            return hidden
        if place not in self._rooms:
            size = 1, self._most_rows, hidden.shape[2]
            self._rooms[place] = hidden.new_empty(size)
        return self._rooms[place][:, :rows].copy_(hidden)

    def call(self, size: Size, run: Pass, inputs: Tensors) -> Tensors:
        """Do so by a graph, if one was captured.

        Raises:
            torch.OutOfMemoryError: all graphs are let go of.
        """
        if size.rows > self._most_rows:
            return run(*inputs)
        try:
            return self._call(size, run, inputs)
        except torch.OutOfMemoryError:
            self._kept.clear()
            self._rooms.clear()
            raise

    def _call(self, size: Size, run: Pass, inputs: Tensors) -> Tensors:
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
        try:
            graph, outputs = self._record(run, own)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()  # the allocator may not, within a capture
            graph, outputs = self._record(run, own)

        def replay(inputs: Tensors) -> Tensors:
            for mine, given in zip(own, inputs, strict=True):
                mine.copy_(given)
            graph.replay()
            return outputs

        return replay

    def _record(self, run: Pass, own: Tensors) -> tuple[torch.cuda.CUDAGraph, Tensors]:
        """Capture without `torch.cuda.graph`, which gives all cached memory back first.

        Passes after that took 60 to 110 ms longer on an H200.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(self._stream):
            # other threads of a worker copy results meanwhile
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                outputs = run(*own)
            finally:
                graph.capture_end()
        return graph, outputs
