# SPDX-License-Identifier: Apache-2.0
"""Time of decode and prefill with the plugin against stock vLLM.

Engines of the same model, with and without the plugin, live on one device at the same
time and are measured in turn, in short rounds. A ratio is taken within a round, so
that drift of clocks and temperature cancels; its median over the rounds is printed
with a bootstrap interval. Stock is measured twice in every round: the ratio of these
two shows what is noise. Results go to a JSON file after every round, the picture
beside it.

`python -m benchmarks.overhead serve` asks two servers instead, and
`python -m benchmarks.overhead draw FILE.json` draws a file's last run again.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from pathlib import Path

from benchmarks.overhead import serve
from benchmarks.overhead.arguments import modes, prefills, sizes
from benchmarks.overhead.engines import EngineOptions, groups, started
from benchmarks.overhead.models import DTYPE_BYTES, Model
from benchmarks.overhead.modes import MODES
from benchmarks.overhead.processes import ProcessError
from benchmarks.overhead.ratios import agreement, lines, summarise
from benchmarks.overhead.record import ResultFile, conditions, read_runs
from benchmarks.overhead.rounds import Cell, Deadline, Schedule

RESULTS = Path("benchmarks/results")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the engine benchmark."""
    parser = argparse.ArgumentParser("benchmarks.overhead", description=__doc__)
    parser.add_argument(
        "--model", default="olmoe", help="olmoe, qwen3-30b or a folder with a config"
    )
    parser.add_argument("--modes", type=modes, default=MODES, help=",".join(MODES))
    parser.add_argument("--batch", type=sizes, default=(1, 8, 64, 256))
    parser.add_argument(
        "--prefill", type=prefills, default=((8, 128), (64, 128)), help="8x128,64x128"
    )
    parser.add_argument("--prompt", type=int, default=32, help="tokens before decode")
    parser.add_argument("--steps", type=int, default=64, help="decode steps timed")
    parser.add_argument("--repeat", type=int, default=10, help="rounds at most")
    parser.add_argument(
        "--budget", type=float, default=200, help="seconds; later no round starts"
    )
    parser.add_argument("--dtype", choices=DTYPE_BYTES, default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="no graphs, no compile")
    parser.add_argument(
        "--in-turn",
        action="store_true",
        help="start engines one by one: start-up undisturbed, device memory of each",
    )
    parser.add_argument("--out", type=Path, help="results/overhead-MODEL.json")
    return parser


def run(args: argparse.Namespace, begin: float) -> dict:
    """Measure all groups of engines; return the run as it stands in the file."""
    model = Model.find(args.model)
    cells = [Cell("decode", size, args.prompt, args.steps) for size in args.batch]
    cells += [Cell("prefill", *pair) for pair in args.prefill]
    options = EngineOptions(model, cells, args.dtype, args.eager)
    run = {
        "benchmark": "overhead",
        "conditions": conditions(vars(args), model),
        "groups": [],
        "samples": [],
    }
    file = ResultFile(args.out)

    def save(samples: list[dict]) -> None:
        run["samples"] += samples
        run["summary"] = summarise(run["samples"])
        run["tokens_equal_stock"] = agreement(run["samples"])
        file.write(run)

    todo = groups(args.modes, options)
    for number, kinds in enumerate(todo):
        print(f"engines at once: {', '.join(kinds)}", flush=True)
        logs = args.out.with_name(f"{args.out.stem}-{number}")
        with started(kinds, options, args.in_turn, logs) as (engines, facts):
            run["groups"].append(facts)
            schedule = Schedule(engines, args.modes, cells, number)
            schedule.warm_up()
            print(f"warm after {time.perf_counter() - begin:.1f} s", flush=True)
            deadline = Deadline(begin + args.budget * (number + 1) / len(todo))
            schedule.run(args.repeat, deadline, save)
    return run


def report(run: dict) -> None:
    """Print what was found."""
    print("\n".join(lines(run["summary"])))
    for facts in run["groups"]:
        for kind, fact in facts.items():
            memory = fact["memory"] or {}
            sizes = (f"{k} {v / 2**30:.2f} GiB" for k, v in memory.items() if v)
            print(f"start {kind}: {fact['start_s']:.1f} s", *sizes)
    for mode, (equal, all_) in run["tokens_equal_stock"].items():
        print(f"tokens of {mode} equal stock's in {equal} of {all_} batches")


def main() -> int:
    """Run the part that the command line names."""
    begin = time.perf_counter()
    # so that a kill from outside ends what we started, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    part, rest = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if part == "serve":
        return serve.main(rest)
    if part == "draw":
        return draw_file(Path(rest[0]))
    args = parser().parse_args()
    args.out = args.out or RESULTS / f"overhead-{Path(args.model).name}.json"
    try:
        report(run(args, begin))
    except (ProcessError, ValueError) as err:
        print(err, file=sys.stderr)
        return 1
    return draw_file(args.out)


def draw_file(path: Path) -> int:
    """Draw a file's last run beside it."""
    from benchmarks.overhead.plot import draw

    picture = path.with_suffix(".png")
    draw(read_runs(path)[-1]).savefig(picture, dpi=150)
    print(f"wrote {path} and {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
