# SPDX-License-Identifier: Apache-2.0
"""Quality of answers with and without test-time routing; see docs/quality.md.

python -m benchmarks.quality COMMAND --help
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.quality.commands import COMMANDS


def parser() -> argparse.ArgumentParser:
    """Return the parser with every command."""
    parser = argparse.ArgumentParser("benchmarks.quality", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS.values():
        own = commands.add_parser(command.name, help=command.summary)
        command.add_options(own)
    return parser


def main() -> int:
    """Run the command that the command line names."""
    args = parser().parse_args()
    try:
        COMMANDS[args.command].run(args)
    except ValueError as err:
        print(err, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
