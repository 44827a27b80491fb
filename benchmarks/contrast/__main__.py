# SPDX-License-Identifier: Apache-2.0
"""What self-contrast costs.

`python -m benchmarks.contrast cost --model olmoe --pairs 1,8,64` times decode steps of
contrast requests against as many plain ones, in one real engine.
`python -m benchmarks.contrast kernel` times the combining kernels against the time to
move their bytes, on one GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.contrast import cost, kernel
from benchmarks.overhead.arguments import sizes

RESULTS = Path("benchmarks/results")


def parser() -> argparse.ArgumentParser:
    """Return the parser of both parts."""
    parser = argparse.ArgumentParser("benchmarks.contrast", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    part = parts.add_parser("cost", help=cost.__doc__.split("\n")[0])
    part.add_argument("--model", default="olmoe", help="as of benchmarks.overhead")
    part.add_argument("--pairs", type=sizes, default=(1, 8, 64))
    part.add_argument("--rank", type=int, default=2, help="of the weak stream's expert")
    part.add_argument("--prompt", type=int, default=32, help="tokens before decode")
    part.add_argument("--steps", type=int, default=64, help="decode steps timed")
    part.add_argument("--repeat", type=int, default=10, help="rounds at most")
    part.add_argument(
        "--budget", type=float, default=200, help="seconds; later no round starts"
    )
    part.add_argument("--dtype", choices=cost.DTYPE_BYTES, default="bfloat16")
    part.add_argument("--eager", action="store_true", help="no graphs, no compile")
    part.add_argument("--out", type=Path, help="results/contrast-MODEL.json")
    part = parts.add_parser("kernel", help=kernel.__doc__.split("\n")[0])
    part.add_argument("--vocab", type=sizes, default=(50304, 128256, 151936))
    part.add_argument("--pairs", type=sizes, default=(1, 8, 64, 256))
    part.add_argument("--out", type=Path, default=RESULTS / "contrast-kernel.json")
    return parser


def main() -> int:
    """Run the part that the command line names."""
    options = parser()
    args = options.parse_args()
    if args.part == "kernel":
        return kernel.main(args.vocab, args.pairs, args.out)
    args.out = args.out or RESULTS / f"contrast-{Path(args.model).name}.json"
    # the engine runs in this process, step by step
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    try:
        return cost.main(args)
    except ValueError as err:
        options.error(str(err))


if __name__ == "__main__":
    sys.exit(main())
