# SPDX-License-Identifier: Apache-2.0
"""How the loss on prompts falls while their routing adapts to them.

`python -m benchmarks.reroute.curve MODEL PROMPTS.jsonl --field question` adapts each
prompt by itself and prints, for each number of steps, in what share of the prompts the
loss is lower than before and the mean loss in nats a token. `--out FILE.json` appends
the run, every prompt's curve included. CPU, from the checkpoint's files.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import statistics
import time
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from transformers import AutoTokenizer

from benchmarks.overhead.record import ResultFile
from moe_tta.adapter import AdapterModel, Outcome, Rerouting, Round
from moe_tta.adapter.curve import loss_curves


def read_prompts(path: Path, field: str, count: int) -> list[str]:
    """Return the first `count` prompts of a JSON-lines file."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line)[field] for line in itertools.islice(lines, count)]


def summary(rounds: list[Round]) -> list[dict]:
    """Return one row for each number of steps, over the adapted rounds."""
    curves = [done.losses for done in rounds if done.outcome is Outcome.ADAPTED]
    rows = []
    for step, losses in enumerate(zip(*curves, strict=True)):
        fallen = [loss < curve[0] for loss, curve in zip(losses, curves, strict=True)]
        changes = [loss - curve[0] for loss, curve in zip(losses, curves, strict=True)]
        rows.append(
            {
                "steps": step,
                "fallen": sum(fallen) / len(fallen),
                "mean_loss": statistics.fmean(losses),
                "mean_change": statistics.fmean(changes),
                "worst_change": max(changes),
            }
        )
    return rows


def measure(args: argparse.Namespace, settings: Rerouting) -> dict:
    """Adapt all prompts; return conditions, summary and raw curves."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = read_prompts(args.prompts, args.field, args.count)
    sequences = [tokenizer(prompt).input_ids for prompt in prompts]
    model = AdapterModel.from_checkpoint(args.model)
    start = time.perf_counter()
    rounds = loss_curves(model, sequences, settings, args.batch)
    seconds = time.perf_counter() - start
    return {
        "conditions": {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "model": args.model.name,
            "dtype": str(model.dtype),
            "device": "cpu",
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "prompts": f"{args.prompts.parent.name}/{args.prompts.name}",
            "prompts_sha256": hashlib.sha256(args.prompts.read_bytes()).hexdigest(),
            "count": len(prompts),
            "tokens": sum(map(len, sequences)),
            "batch": args.batch,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "settings": asdict(settings),
        "seconds": round(seconds, 1),
        "outcomes": [done.outcome.value for done in rounds],
        "summary": summary(rounds),
        "losses": [[round(loss, 6) for loss in done.losses] for done in rounds],
        "layers": [done.layers for done in rounds],
    }


def make_parser() -> argparse.ArgumentParser:
    """Return the command line: the run, and every setting of a round it may vary."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint folder")
    parser.add_argument("prompts", type=Path, help="JSON lines")
    parser.add_argument("--field", default="question", help="member with the prompt")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--out", type=Path)
    for name in (
        "steps",
        "lr",
        "optimizer",
        "choice",
        "share",
        "sign",
        "clip",
        "pairs",
    ):
        default = getattr(Rerouting, name)
        parser.add_argument(f"--{name}", type=type(default), default=default)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    asked = {key: value for key, value in vars(args).items() if hasattr(Rerouting, key)}
    run = measure(args, Rerouting(**asked))
    for row in run["summary"]:
        print(
            "steps {steps:3}  fallen {fallen:6.1%}  loss {mean_loss:.4f}  "
            "change {mean_change:+.4f}  worst {worst_change:+.4f}".format(**row)
        )
    if args.out is not None:
        ResultFile(args.out).write(run)


if __name__ == "__main__":
    main()
