# SPDX-License-Identifier: Apache-2.0
"""Online rerouting against the model as it is, worked examples and votes.

All arms answer the same questions. The settings of rerouting are chosen on the task's
tuning part, and so is the number of worked examples; the chosen arms and the published
setting answer the test part once. What happened in the rounds is kept.

Source: Rewiring Experts on the Fly, arXiv 2510.14853, which also compares with worked
examples. What it leaves open is listed in docs/adapter.md.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.quality import arms, options
from benchmarks.quality.arms import Arm
from benchmarks.quality.commands.command import Command
from benchmarks.quality.protocol import follow
from benchmarks.quality.tasks import TASKS, find_task, worked_examples

TEXT_TASKS = [task.name for task in TASKS.values() if task.kind != "choice"]
PUBLISHED = Arm(
    "reroute as published",
    "published",
    {"reroute": {"steps": 5, "lr": 0.05, "every": 128}},
)
# settings of `reroute` that are swept: how they are read, and their defaults
SWEPT: dict[str, tuple[type, str]] = {
    "lr": (float, "0.05,0.2"),
    "steps": (int, "5"),
    "every": (int, "128,0"),
    "share": (float, "0.5"),
    "sign": (int, "1,-1"),
    "mode": (str, "wait"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what is swept, and the baselines."""
    options.add_shared(parser, TEXT_TASKS)
    for name, (kind, default) in SWEPT.items():
        parser.add_argument(
            f"--{name}",
            dest=f"swept_{name}",
            type=options.numbers(kind),
            default=default,
            help=f"of reroute, comma-separated; default {default}",
        )
    ints = options.numbers(int)
    parser.add_argument(
        "--in-context", type=ints, default="", help="worked examples, e.g. 3,8"
    )
    parser.add_argument(
        "--vote", type=ints, default="", help="sampled texts of the plain model, e.g. 5"
    )
    parser.add_argument("--vote-temperature", type=float, default=0.7)
    adapter = parser.add_argument_group("the setting adapter, see docs/serve.md")
    adapter.add_argument("--budget", type=int, default=2048)
    adapter.add_argument("--batch-tokens", type=int, default=0)


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: with what is expected.
    """
    options.check_shared(args)
    if args.in_context and args.shots:
        raise ValueError("expected --in-context or --shots, not both")
    if min(args.in_context, default=1) < 1:
        raise ValueError("expected --in-context 1 or more")
    if args.vote and TASKS[args.task].kind == "code":
        raise ValueError(f"{args.task} is answered by programs: they have no vote")
    if min(args.vote, default=2) < 2 or args.vote_temperature <= 0:
        raise ValueError("expected --vote 2 or more, --vote-temperature above 0")


def families(args: argparse.Namespace) -> dict[str, list[Arm]]:
    """Return the arms by family."""
    most = max(args.in_context, default=0)
    examples = worked_examples(find_task(args.task), args.data, most) if most else ()
    return {
        "plain": [arms.PLAIN],
        "in context": arms.in_context(examples, args.in_context),
        "vote": arms.votes(args.vote, args.vote_temperature),
        "reroute": arms.reroute({name: vars(args)[f"swept_{name}"] for name in SWEPT}),
    }


def run(args: argparse.Namespace) -> None:
    """Sweep, choose, test, write."""
    check_options(args)
    adapter: dict[str, Any] = {
        "budget": args.budget,
        "max_context": args.max_model_len,
        "batch_tokens": args.batch_tokens,
    }
    follow(args, families(args), PUBLISHED, settings={"adapter": adapter})


REROUTE = Command(
    "reroute", "online rerouting: sweep on one part, test on another", add_options, run
)
