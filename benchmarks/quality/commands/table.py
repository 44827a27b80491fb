# SPDX-License-Identifier: Apache-2.0
"""Tables and the sweep's picture from result files."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.commands.command import Command
from benchmarks.quality.report import NATS, nats_table, read_results, table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the files."""
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--role", choices=("test", "tune"), default="test")
    parser.add_argument(
        "--nats", choices=NATS, help="right choices' log-likelihood, not accuracy"
    )
    parser.add_argument("--plot", type=Path, help="draw the beta sweeps here")


def run(args: argparse.Namespace) -> None:
    """Print a Markdown table of all files; draw if asked."""
    results = read_results(args.files)
    if args.nats:
        lines = nats_table(results, args.nats, args.role)
    else:
        lines = table(results, args.role)
    print("\n".join(lines))
    if args.plot:
        from benchmarks.quality.plot import sweeps

        sweeps(results).savefig(args.plot, dpi=150)


TABLE = Command("table", "Markdown and picture of result files", add_options, run)
