# SPDX-License-Identifier: Apache-2.0
"""The commands: one module each, one line here."""

from __future__ import annotations

from benchmarks.quality.commands.command import Command
from benchmarks.quality.commands.contrast import CONTRAST
from benchmarks.quality.commands.remix import REMIX
from benchmarks.quality.commands.reroute import REROUTE
from benchmarks.quality.commands.table import TABLE

COMMANDS: dict[str, Command] = {}


def register(command: Command) -> None:
    """Add a command.

    Raises:
        ValueError: there is one of that name.
    """
    if command.name in COMMANDS:
        raise ValueError(f"command {command.name!r} is registered twice")
    COMMANDS[command.name] = command


register(CONTRAST)
register(REMIX)
register(REROUTE)
register(TABLE)
