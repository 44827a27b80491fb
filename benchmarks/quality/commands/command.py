# SPDX-License-Identifier: Apache-2.0
"""What a command is."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A subcommand of `python -m benchmarks.quality`.

    Attributes:
        name: On the command line.
        summary: One line of help.
        add_options: Adds its options to a parser.
        run: Runs it; user errors are `ValueError`s.
    """

    name: str
    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]
