# SPDX-License-Identifier: Apache-2.0
"""Which positions of a request a strategy acts on.

Spans speak of absolute positions p and the prompt length P, never of prefill and
decode: preemption and chunking recompute rows, but do not move them. A request may say
by `prompt_tokens` that its prompt ends earlier than what vLLM was given: what follows
counts as generated.
"""

from __future__ import annotations

from typing import Literal

Span = Literal["all", "prompt", "generated", "last_prompt", "last_prompt+generated"]

# positions [0, P-1), [P-1, P) and [P, inf): no span tells rows of one segment apart
SEGMENTS = ("body", "last", "generated")

_SEGMENTS_OF: dict[Span, tuple[bool, bool, bool]] = {
    "all": (True, True, True),
    "prompt": (True, True, False),
    "generated": (False, False, True),
    "last_prompt": (False, True, False),
    "last_prompt+generated": (False, True, True),
}


def span_segments(span: Span) -> tuple[bool, bool, bool]:
    """Say for each of `SEGMENTS` whether a span covers it."""
    return _SEGMENTS_OF[span]
