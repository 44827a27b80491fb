# SPDX-License-Identifier: Apache-2.0
"""Self-contrast against the model as it is, the best fixed k and the best top-p.

All arms answer the same questions. Beta, alpha and the weak routing are chosen on the
task's tuning part, and so are k and p; the chosen arms and the published setting answer
the test part once.

Source: SCMoE, arXiv 2405.14507, section 4.
Differs: there, settings were chosen on the questions they are reported for. Contrastive
search, a baseline there, is not in vLLM 0.32 and left out.
"""

from __future__ import annotations

import argparse

from benchmarks.quality import arms, options
from benchmarks.quality.arms import Arm
from benchmarks.quality.commands.command import Command
from benchmarks.quality.protocol import follow

PUBLISHED = Arm(
    "contrast as published",
    "published",
    {"contrast": {"weak": {"rank": 2}, "beta": 0.5, "alpha": 0.1}},
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what is swept."""
    options.add_shared(parser)
    parser.add_argument(
        "--weak", type=weak_routings, default="rank=2,k=1", help="rank=R or k=K, ..."
    )
    floats, ints = options.numbers(float), options.numbers(int)
    parser.add_argument("--beta", type=floats, default="0.1,0.3,0.5,0.7,0.9")
    parser.add_argument("--alpha", type=floats, default="0.1", help="plausibility")
    parser.add_argument("--fixed-k", type=ints, default="", help="baselines, e.g. 1,3")
    parser.add_argument("--top-p", type=floats, default="", help="baselines, e.g. 0.6")


def weak_routings(text: str) -> list[dict[str, int]]:
    """Read a list such as `rank=2,k=1`."""
    found = []
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in ("rank", "k") or not value.isdigit():
            raise argparse.ArgumentTypeError(f"expected rank=R or k=K, got {part!r}")
        found.append({name: int(value)})
    return found


def families(args: argparse.Namespace) -> dict[str, list[Arm]]:
    """Return the arms by family, those to choose from and those as they are."""
    return {
        "plain": [arms.PLAIN],
        "fixed k": arms.fixed_k(args.fixed_k),
        "top-p": arms.top_p(args.top_p),
        "contrast": arms.contrast(args.weak, args.beta, args.alpha),
    }


def run(args: argparse.Namespace) -> None:
    """Sweep, choose, test, write."""
    options.check_shared(args)
    follow(args, families(args), PUBLISHED)


CONTRAST = Command(
    "contrast", "self-contrast: sweep on one part, test on another", add_options, run
)
