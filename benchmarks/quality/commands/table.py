# SPDX-License-Identifier: Apache-2.0
"""Tables and pictures from result files."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.quality.commands.command import Command
from benchmarks.quality.compute import compute_table
from benchmarks.quality.report import NATS, nats_table, read_results, table


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the files."""
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--role", choices=("test", "tune"), default="test")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument(
        "--nats", choices=NATS, help="right choices' log-likelihood, not accuracy"
    )
    shown.add_argument(
        "--compute", action="store_true", help="what generated answers cost"
    )
    parser.add_argument("--plot", type=Path, help="draw the beta sweeps here")
    parser.add_argument("--plot-rounds", type=Path, help="draw rounds' losses here")


def run(args: argparse.Namespace) -> None:
    """Print a Markdown table of all files; draw if asked."""
    results = read_results(args.files)
    if args.nats:
        lines = nats_table(results, args.nats, args.role)
    elif args.compute:
        lines = compute_table(results, args.role)
    else:
        lines = table(results, args.role)
    print("\n".join(lines))
    if args.plot:
        from benchmarks.quality.plot import sweeps

        sweeps(results).savefig(args.plot, dpi=150)
    if args.plot_rounds:
        from benchmarks.quality.round_plot import losses_of_rounds

        losses_of_rounds(results, args.role).savefig(args.plot_rounds, dpi=150)


TABLE = Command("table", "Markdown and picture of result files", add_options, run)
