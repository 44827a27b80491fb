# SPDX-License-Identifier: Apache-2.0
"""Neighbour re-mixing against the plain model, in-context examples and an oracle.

The published settings are tested as they are. On the tuning part one setting at a time
is changed, to see what they do; `--more-rates` tests gradient descent at other rates.

Source: C3PO, arXiv 2504.07964, section 4.
Differs: MiniLM embeds, as in the released code, where the paper names NV-Embed-V2;
mode finding has alpha 0; the random references are ours.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from benchmarks.overhead.models import Model
from benchmarks.quality import options
from benchmarks.quality.arms import PLAIN, Arm
from benchmarks.quality.choices import ChoiceJudge
from benchmarks.quality.commands.command import Command
from benchmarks.quality.remix.sets import REFERENCES, REFUSED
from benchmarks.quality.report import write_result
from benchmarks.quality.study import Answers, ask
from benchmarks.quality.tasks import Part, find_task, load
from moe_tta.remix.lookup import DEFAULT_K, MAX_NEIGHBOURS
from moe_tta.remix.weights import BY_DISTANCE

if TYPE_CHECKING:
    from benchmarks.quality.remix.methods import Method
    from moe_tta.remix.store import Store

# C3PO, arXiv 2504.07964
LAST_LAYERS, STEPS, RATE = 5, 10, 1e-2
MAX_STEPS = 1000


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the method has."""
    options.add_study(parser, [*REFERENCES, *REFUSED])
    parser.set_defaults(shots=0)
    parser.add_argument(
        "--tune", type=int, default=0, help="questions to change settings on"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of the adapter"
    )
    parser.add_argument(
        "--neighbours", action="store_true", help="report how near neighbours are"
    )
    parser.add_argument(
        "--references", type=int, help="questions of each reference set; default all"
    )
    parser.add_argument("--k", type=int, default=DEFAULT_K, help="neighbours")
    parser.add_argument("--kernel", choices=BY_DISTANCE, default="gaussian")
    parser.add_argument(
        "--layers", type=int, default=LAST_LAYERS, help="how many, from the last"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of gradient descent")
    parser.add_argument("--lr", type=float, default=RATE, help="of the first step")
    parser.add_argument(
        "--more-rates", type=options.numbers(float), default=[], help="such as 1,10"
    )


def check_options(args: argparse.Namespace, num_layers: int) -> None:
    """Refuse numbers that are too small or too large.

    Raises:
        ValueError: with what is expected.
    """
    ranges = {"k": MAX_NEIGHBOURS, "layers": num_layers, "steps": MAX_STEPS}
    for name, most in ranges.items():
        if not 1 <= (given := getattr(args, name)) <= most:
            raise ValueError(f"expected --{name} from 1 to {most}, got {given}")
    for rate in (args.lr, *args.more_rates):
        if not 0 < rate < math.inf:
            raise ValueError(f"expected rates of descent above 0, got {rate}")


def run(args: argparse.Namespace) -> None:
    """Build the references, test, write.

    Raises:
        ValueError: the task cannot be asked so, or what `check_options` raises.
    """
    if args.task in REFUSED:
        raise ValueError(f"remix cannot test {args.task}: {REFUSED[args.task]}")
    task, model = find_task(args.task), Model.find(str(args.model))
    check_options(args, len(model.shape.layers))
    # torch and transformers: not for the other commands
    from benchmarks.quality.remix.methods import all_methods
    from benchmarks.quality.remix.nearness import describe
    from benchmarks.quality.remix.scorer import RemixScorer
    from benchmarks.quality.remix.study import open_study
    from benchmarks.quality.remix.variants import variants

    study = open_study(args, task)

    def asked(part: Part, methods: dict[Arm, Method]) -> Answers:
        judge = ChoiceJudge(lambda: RemixScorer(study, methods), task.normalisation)
        return ask(args, task, part, list(methods), judge)

    experts = model.shape.num_experts
    methods = all_methods(experts, args.steps, args.lr, args.more_rates)
    parts = {"test": asked(task.test, methods)}
    if args.tune:
        parts["tune"] = asked(task.tune, variants(study, args.steps, args.lr))
    more = {"store": _about(study.store)}
    if args.neighbours:
        asked_of = load(task, task.test, args.data, args.shots, args.test, args.seed)
        more["neighbours"] = describe(study, asked_of[0])
    write_result(args, model, parts, PLAIN, more)


def _about(store: Store) -> dict[str, Any]:
    names = ("counts", "score", "embedder", "duplicates_from", "data_sha256")
    return store.card.model_dump(include=set(names))


REMIX = Command(
    "remix", "neighbour re-mixing: all updates, test part", add_options, run
)
