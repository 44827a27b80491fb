# SPDX-License-Identifier: Apache-2.0
"""Asks a dense model and its MoE for GSM8K and HumanEval, and judges the answers.

    python -m benchmarks.lab.skills ask --dense DENSE --data DATA --out TEXTS
        [--moe MOE] [--engine vllm]
    python -m benchmarks.lab.skills judge --data DATA --out SKILLS TEXTS

DENSE and MOE are checkpoint folders, DATA holds gsm8k/ and humaneval/: docs/quality.md
says where from. The texts are a file of their own because programs are judged in a
sandbox, which some GPU machines cannot give: judge them anywhere.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from benchmarks.lab.scoring import bootstrap
from benchmarks.lab.writers import WRITERS, Write
from benchmarks.quality.sandbox import run_program
from benchmarks.quality.tasks import TASKS, load
from benchmarks.quality.tasks.code import COMPLETION
from benchmarks.quality.tasks.question import Task, TextQuestion

SHOTS = {"gsm8k": 4, "humaneval": 0}
SEED = 0


def questions(task: Task, folder: Path, limit: int | None) -> list[TextQuestion]:
    """Every question of the published test split, or a sample of them."""
    parts = {str(p): p for p in (task.tune, task.test) if p.split == "test"}
    shots, found = SHOTS[task.name], []
    for part in parts.values():
        found += load(task, part, folder, shots, None, SEED)[0]
    found.sort(key=lambda question: question.id)
    if limit is not None:
        order = np.random.default_rng(SEED).permutation(len(found))[:limit]
        found = [found[i] for i in order]
    return found


def texts_of(write: Write, args: argparse.Namespace) -> dict:
    """Texts by task and question, with the seconds each task took."""
    found = {}
    for name in args.tasks:
        task, start = TASKS[name], time.monotonic()
        asked = questions(task, args.data, args.limit)
        prompts = [question.prompt for question in asked]
        texts = write(prompts, task.stop, args.max_tokens)
        by_id = {q.id: text for q, text in zip(asked, texts, strict=True)}
        found[name] = {"seconds": time.monotonic() - start, "texts": by_id}
    return found


def ask(args: argparse.Namespace) -> None:
    """Writes the texts of the dense model, and of the MoE under each routing."""
    runs = [("dense", args.dense, None)]
    if args.moe:
        runs += [(f"moe, {routing}", args.moe, routing) for routing in args.routing]
    cuda = torch.cuda.is_available()
    conditions = {
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "engine": args.engine,
        "dtype": "bfloat16",
        "shots": SHOTS,
        "limit": args.limit,
        "max_tokens": args.max_tokens,
    }
    answers = {}
    for label, folder, routing in runs:
        with WRITERS[args.engine](folder, routing, args.batch) as write:
            answers[label] = texts_of(write, args)
        text = json.dumps({"conditions": conditions, "answers": answers}, indent=1)
        args.out.write_text(text + "\n", encoding="utf-8")  # each run is kept


def is_right(task: Task, question: TextQuestion, text: str) -> bool:
    """Whether a text is the right answer; programs are run.

    Raises:
        SandboxError: this machine cannot confine programs.
    """
    if task.kind == "code":
        program = question.gold.replace(COMPLETION, text)
        return run_program(program).verdict == "passed"
    return task.extract(text) == question.gold


def judge(args: argparse.Namespace) -> None:
    """Writes the share of right answers, and its difference from the dense model."""
    given = json.loads(args.texts.read_text(encoding="utf-8"))
    right = {}
    for label, tasks in given["answers"].items():
        for name, entry in tasks.items():
            known = {q.id: q for q in questions(TASKS[name], args.data, None)}
            right[label, name] = np.array(
                [
                    is_right(TASKS[name], known[id], text)
                    for id, text in entry["texts"].items()
                ],
                dtype=float,
            )
    results = {}
    for (label, name), scores in right.items():
        results.setdefault(label, {})[name] = {
            "n": len(scores),
            "accuracy": bootstrap(scores),
            "minus_dense": bootstrap(scores - right["dense", name]),
            "seconds": given["answers"][label][name]["seconds"],
        }
    report = {"conditions": given["conditions"], "results": results}
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(results, indent=1))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(required=True)
    asking = commands.add_parser("ask")
    for option in ("--dense", "--data", "--out"):
        asking.add_argument(option, type=Path, required=True)
    asking.add_argument("--moe", type=Path)
    asking.add_argument("--engine", choices=WRITERS, default="transformers")
    asking.add_argument("--tasks", nargs="+", choices=SHOTS, default=list(SHOTS))
    asking.add_argument("--routing", nargs="*", default=["learned", "random"])
    asking.add_argument("--limit", type=int, help="questions a task")
    asking.add_argument("--max-tokens", type=int, default=320)
    asking.add_argument("--batch", type=int, default=192)
    asking.set_defaults(run=ask)
    judging = commands.add_parser("judge")
    judging.add_argument("texts", type=Path, metavar="TEXTS")
    for option in ("--data", "--out"):
        judging.add_argument(option, type=Path, required=True)
    judging.set_defaults(run=judge)
    return parser.parse_args()


def main() -> None:
    args = parse()
    args.run(args)


if __name__ == "__main__":
    main()
