# SPDX-License-Identifier: Apache-2.0
"""Whole requests on one engine, some of them rerouting: times of every token."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from benchmarks.overhead.engine import Engine

LENGTHS = (150, 200)  # tokens of a prompt, as HumanEval's are


class Asked(NamedTuple):
    """One request: its prompt, and what it carries under `moe_tta`."""

    prompt: list[int]
    request: dict[str, Any] | None


@dataclass
class Played:
    """What a batch of requests took.

    Attributes:
        seconds: From the first call of `step()` to the end of the last request.
        gaps: Of each request, seconds between its tokens from the first one on.
        rounds: Reports of all rounds, in no order.
        peak_bytes: Most device memory beyond what was allocated before; `None` on CPU.
    """

    seconds: float
    gaps: list[list[float]]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    peak_bytes: int | None = None


def draw_prompts(count: int, number: int, vocab_size: int) -> list[list[int]]:
    """Return random prompts of HumanEval's lengths, the same for one round's number."""
    rng = random.Random(f"{count}-{number}")
    return [
        [rng.randrange(2, vocab_size) for _ in range(rng.randint(*LENGTHS))]
        for _ in range(count)
    ]


class RerouteEngine(Engine):
    """An engine whose requests are timed token by token; see `Engine`."""

    def play(self, asked: Sequence[Asked], tokens: int) -> Played:
        """Run requests that come at once to their ends, `tokens` new ones each."""
        names = [self._add(one, tokens) for one in asked]
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        times: dict[str, list[float]] = {name: [] for name in names}
        rounds: list[dict[str, Any]] = []
        begin = time.perf_counter()
        while self.core.has_unfinished_requests():
            outputs = self.core.step()
            now = time.perf_counter()
            for output in outputs:
                done = output.outputs[0]
                times[output.request_id] += [now] * len(done.token_ids)
                if output.finished and done.moe_tta is not None:
                    rounds += done.moe_tta["rounds"]
        assert all(len(found) == tokens for found in times.values())
        gaps = [
            [after - last for last, after in pairwise(found)]
            for found in times.values()
        ]
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
        return Played(now - begin, gaps, rounds, peak)

    def _add(self, one: Asked, tokens: int) -> str:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=None if one.request is None else {"moe_tta": one.request},
        )
        name = f"{self.submitted:08}"
        self.submitted += 1
        self.core.add_request(name, {"prompt_token_ids": one.prompt}, params)
        return name
