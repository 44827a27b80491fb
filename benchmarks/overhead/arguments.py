# SPDX-License-Identifier: Apache-2.0
"""Lists on the command line, and what is said of wrong ones."""

from __future__ import annotations

import argparse

from benchmarks.overhead.modes import MODES


def modes(text: str) -> tuple[str, ...]:
    """Read a list of modes; stock comes first in any case."""
    found = tuple(text.split(","))
    unknown = [mode for mode in found if mode not in MODES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"expected some of {', '.join(MODES)}, got {', '.join(unknown)}"
        )
    return tuple(dict.fromkeys(("stock", *found)))


def sizes(text: str) -> tuple[int, ...]:
    """Read a list of whole numbers."""
    try:
        return tuple(int(size) for size in text.split(","))
    except ValueError:
        message = f"expected numbers such as 1,8,64, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None


def prefills(text: str) -> tuple[tuple[int, int], ...]:
    """Read a list of REQUESTSxTOKENS; empty text is none."""
    pairs = (pair.split("x") for pair in text.split(",") if pair)
    try:
        return tuple((int(count), int(tokens)) for count, tokens in pairs)
    except ValueError:
        message = f"expected REQUESTSxTOKENS such as 8x128,64x128, got {text!r}"
        raise argparse.ArgumentTypeError(message) from None
