# SPDX-License-Identifier: Apache-2.0
"""Rounds: every mode and size once, in an order drawn anew, until time is up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.overhead.engine import EDGE
from benchmarks.overhead.modes import AGAIN, ENGINE_OF, STOCK
from benchmarks.overhead.processes import EngineProcess

WARM_STEPS = 2


@dataclass(frozen=True)
class Cell:
    """One thing to measure: `size` requests with `prompt` tokens each."""

    what: str
    size: int
    prompt: int
    steps: int = 0

    @property
    def label(self) -> str:
        """What results call the size."""
        decode = self.what == "decode"
        return str(self.size) if decode else f"{self.size}x{self.prompt}"

    @property
    def length(self) -> int:
        """Tokens of one request at its end, with room for steps in flight."""
        return self.prompt + self.steps + 3 * EDGE


@dataclass
class Deadline:
    """When to start no more rounds: those that would end after `end`, by the last.

    Attributes:
        end: On the clock of `time.perf_counter`.
        longest: Seconds of the longest round so far.
    """

    end: float
    longest: float = field(default=0.0, init=False)

    def allows_another(self) -> bool:
        """Whether one more round is likely to end in time."""
        return time.perf_counter() + self.longest <= self.end


class Schedule:
    """Asks the engines of one group for measurements, one at a time.

    Args:
        engines: By the names of `ENGINE_OF`; stock must be among them.
        modes: Those asked for; the ones whose engine is not here are left out.
        cells: What to measure.
        group: Number of the group, kept in the samples.
    """

    def __init__(
        self,
        engines: Mapping[str, EngineProcess],
        modes: Sequence[str],
        cells: Sequence[Cell],
        group: int,
    ):
        here = [mode for mode in modes if ENGINE_OF[mode] in engines]
        self.engines = engines
        self.modes = [STOCK, *(m for m in here if m != STOCK), AGAIN]
        self.cells = cells
        self.group = group
        self.serial = 0

    def warm_up(self) -> None:
        """Run everything once, briefly: kernels compile, caches fill."""
        for _ in self._round(0, WARM_STEPS):
            pass

    def run(
        self,
        rounds: int,
        deadline: Deadline,
        save: Callable[[list[dict[str, Any]]], None],
    ) -> None:
        """Measure; the first round runs in any case.

        Args:
            rounds: The most there are.
            deadline: Stops earlier.
            save: Called with each round's samples.
        """
        for number in range(1, rounds + 1):
            begin = time.perf_counter()
            save(list(self._round(number)))
            took = time.perf_counter() - begin
            deadline.longest = max(deadline.longest, took)
            left = deadline.end - time.perf_counter()
            print(f"round {number}: {took:.1f} s, {left:.0f} s left", flush=True)
            if number < rounds and not deadline.allows_another():
                print(f"stopped after round {number}: out of time", flush=True)
                return

    def _round(self, number: int, steps: int | None = None) -> Iterator[dict[str, Any]]:
        """Yield a round's samples; cells and modes in random order, by its number."""
        rng = random.Random(number)
        for cell in rng.sample(self.cells, len(self.cells)):
            for mode in rng.sample(self.modes, len(self.modes)):
                yield from self._measure(cell, mode, number, steps)

    def _measure(
        self, cell: Cell, mode: str, number: int, steps: int | None
    ) -> Iterator[dict[str, Any]]:
        self.serial += 1
        order = {
            "what": cell.what,
            "size": cell.size,
            "prompt": cell.prompt,
            "steps": cell.steps if steps is None else steps,
            "mode": mode,
            "round": number,
            "serial": self.serial,
        }
        answer = self.engines[ENGINE_OF[mode]].ask(order)
        for measure, seconds in answer["seconds"].items():
            sample = {
                "group": self.group,
                "round": number,
                "mode": mode,
                "measure": measure,
                "size": cell.label,
                "seconds": seconds,
            }
            if measure == cell.what:
                sample["digest"] = answer["digest"]
            yield sample
