# SPDX-License-Identifier: Apache-2.0
"""Device time of one launch inside a CUDA graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

_REPLAYS = 4  # between two events
_AHEAD_CYCLES = 400_000  # the device waits this long, so that the host is never late


def median_us(launches: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """Return the median microseconds per launch over `repeats` measurements.

    The launches run one after the other in one graph, as kernels of a decode step do.
    What they return is kept until the end, so that each writes memory of its own.
    """
    for launch in launches:  # compiles
        launch()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [launch() for launch in launches]
    for _ in range(2):
        graph.replay()
    times = [_replay_us(graph) for _ in range(repeats)]
    del kept
    return statistics.median(times) / len(launches)


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_AHEAD_CYCLES)
    start.record()
    for _ in range(_REPLAYS):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3 / _REPLAYS
