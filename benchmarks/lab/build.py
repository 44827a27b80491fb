# SPDX-License-Identifier: Apache-2.0
"""Builds a lab model's dense model, or the MoE of any differences, unchecked.

    python -m benchmarks.lab.build NAME dense --out OUT [--cache CACHE]
    python -m benchmarks.lab.build NAME moe --out OUT [--cache CACHE]
        [--differences FILE]

CACHE keeps the dense model's GGUF file, which is downloaded if it is not there.
Without FILE the MoE is the untrained one.
"""

import argparse
from pathlib import Path

from moe_tta.lab import MODELS
from moe_tta.lab.cache import default_cache
from moe_tta.lab.fetch import fetch_gguf
from moe_tta.lab.upcycle import write_dense, write_moe


def build_dense(args: argparse.Namespace) -> None:
    gguf = fetch_gguf(MODELS[args.name].dense, args.cache / "dense")
    write_dense(gguf, args.out)


def build_moe(args: argparse.Namespace) -> None:
    model = MODELS[args.name]
    gguf = fetch_gguf(model.dense, args.cache / "dense")
    write_moe(gguf, args.differences, args.out, model.upcycle, progress=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    names = [name for name, model in MODELS.items() if model.upcycle]
    parser.add_argument("name", choices=names)
    commands = parser.add_subparsers(required=True)
    for command, run in (("dense", build_dense), ("moe", build_moe)):
        sub = commands.add_parser(command)
        sub.add_argument("--out", type=Path, required=True)
        sub.add_argument("--cache", type=Path, default=default_cache())
        sub.set_defaults(run=run)
    sub.add_argument("--differences", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.run(args)


if __name__ == "__main__":
    main()
