# SPDX-License-Identifier: Apache-2.0
"""Options that every command takes."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from pathlib import Path

from benchmarks.overhead.models import DTYPE_BYTES
from benchmarks.quality.tasks import TASKS

RESULTS = Path("benchmarks/results/quality")


def add_study(parser: argparse.ArgumentParser, tasks: Collection[str]) -> None:
    """Add the options of model, data, sampling and output.

    Args:
        parser: Of a command.
        tasks: Names of those it knows.
    """
    parser.add_argument("--model", type=Path, required=True, help="checkpoint folder")
    parser.add_argument("--data", type=Path, required=True, help="see docs/quality.md")
    parser.add_argument("--task", choices=tasks, required=True)
    parser.add_argument("--test", type=int, help="questions to report; default all")
    parser.add_argument("--seed", type=int, default=0, help="of samples")
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16")
    parser.add_argument(
        "--work", type=Path, default=Path("quality-work"), help="unfinished runs"
    )
    parser.add_argument(
        "--out", type=Path, help=f"default {RESULTS}/COMMAND-MODEL-TASK.json"
    )


def add_shared(
    parser: argparse.ArgumentParser, tasks: Collection[str] = TASKS.keys()
) -> None:
    """Add the options of commands that tune settings and run vLLM.

    Args:
        parser: Of a command.
        tasks: Names of those it knows.
    """
    add_study(parser, tasks)
    parser.add_argument("--tune", type=int, default=200, help="questions to choose on")
    parser.add_argument("--shots", type=int, default=0, help="worked examples")
    parser.add_argument("--k-max", type=int, help="widest routing; default the model's")
    engine = parser.add_argument_group("generated answers and vLLM")
    engine.add_argument("--max-model-len", type=int, default=2048)
    engine.add_argument("--max-num-seqs", type=int, default=32)
    engine.add_argument("--kv-gib", type=float, default=1, help="KV cache, GiB")
    engine.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        help="share of a GPU that must be free at the start",
    )
    engine.add_argument("--eager", action="store_true", help="no graphs, no compile")
    engine.add_argument("--moe-backend", default="auto", help="vLLM's, of experts")
    engine.add_argument("--max-tokens", type=int, default=512)
    engine.add_argument("--temperature", type=float, default=0.0)
    engine.add_argument(
        "--samples",
        type=int,
        default=1,
        help="answers a question; their majority counts",
    )
    engine.add_argument(
        "--run-code",
        action="store_true",
        help="run generated programs, confined (Linux: namespaces, Landlock)",
    )

    parser.add_argument(
        "--write-only",
        action="store_true",
        help="let every arm answer both parts, judge nothing; judge later by the same "
        "command without it",
    )


def check_shared(args: argparse.Namespace) -> None:
    """Refuse options that contradict each other.

    Raises:
        ValueError: with what is expected.
    """
    judged_here = not args.write_only
    if TASKS[args.task].kind == "code" and judged_here and not args.run_code:
        raise ValueError(f"{args.task} runs generated programs: give --run-code")
    if args.samples < 1 or (args.samples > 1 and args.temperature == 0):
        raise ValueError("expected --samples 1, or more with --temperature above 0")
    if args.samples > 1 and TASKS[args.task].kind == "choice":
        raise ValueError(f"{args.task} is not sampled: expected --samples 1")


def numbers(kind: type):
    """Return a reader of comma-separated numbers for argparse."""

    def read(text: str) -> list:
        return [kind(part) for part in text.split(",") if part]

    read.__name__ = f"{kind.__name__}s"
    return read
