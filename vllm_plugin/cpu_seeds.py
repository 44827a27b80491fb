# SPDX-License-Identifier: Apache-2.0
"""Seeded requests on the V1 runner's CPU engines.

vLLM 0.32 draws a token for every row, also for one that is still reading its prompt,
and then rewinds that row's generator by a GPU's offset. A CPU generator has no offset:
the engine dies. Chunked prefill is rare on stock engines, but each request of a pair
stops once before its last prompt token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _unused(runner: Any) -> dict[int, torch.Generator]:
    """Return the generators whose draw of this step will be thrown away, by row."""
    batch = runner.input_batch
    thrown_away = runner.discard_request_mask.np[: batch.num_reqs].nonzero()[0]
    return {
        row: batch.generators[row]
        for row in thrown_away.tolist()
        if row in batch.generators
    }


@contextmanager
def rewound(runner: Any) -> Iterator[None]:
    """Draw tokens; afterwards unused generators stand where they stood."""
    states = [(g, g.get_state()) for g in _unused(runner).values()]
    yield
    for generator, state in states:
        generator.set_state(state)


def hide_unused(runner: Any) -> Callable[[Callable], Callable]:
    """Wrap the runner's bookkeeping, so that it finds no generator to rewind."""

    def make(original: Callable) -> Callable:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            hidden = _unused(runner)
            for row in hidden:
                del runner.input_batch.generators[row]
            result = original(*args, **kwargs)
            runner.input_batch.generators.update(hidden)
            return result

        return wrapped

    return make
