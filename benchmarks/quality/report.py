# SPDX-License-Identifier: Apache-2.0
"""Results as JSON, and as the Markdown tables and the picture made from it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from benchmarks.overhead.models import Model
from benchmarks.overhead.record import conditions
from benchmarks.quality.arms import Arm
from benchmarks.quality.options import RESULTS
from benchmarks.quality.statistics import compare
from benchmarks.quality.study import Answers

# options whose values are machine paths and say nothing about the result
PATHS = ("data", "work", "out", "model")
# lists [n] of each arm of multiple choice
NATS = {
    "gold_nats": "log-likelihood of the right choice, nats",
    "share_nats": "log of the right choice's share of all choices, nats",
}


def write_result(
    args: argparse.Namespace,
    model: Model,
    parts: dict[str, Answers],
    reference: Arm,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write a run's JSON file and print its table.

    Args:
        args: All options.
        model: The model.
        parts: Answers by the part's role, `tune` and `test`.
        reference: The arm that others are compared with.
        more: Members of the file that only this command has; JSON types.
    """
    result = {
        "benchmark": "quality",
        "command": args.command,
        "task": args.task,
        "reference": reference.name,
        "conditions": conditions(flags_of(args), model),
        **more,
        **{role: answers.as_json(reference) for role, answers in parts.items()},
    }
    default = RESULTS / f"{args.command}-{model.name}-{args.task}.json"
    path = args.out or default
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dumps(result))
    print("\n".join([*table([result]), "", f"wrote {path}"]))


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that say something about a result."""
    return {k: v for k, v in vars(args).items() if k not in PATHS}


def dumps(result: dict[str, Any]) -> str:
    """Return JSON with one line for each member and arm, so that diffs can be read."""
    lines = []
    for name, value in result.items():
        if isinstance(value, dict) and "arms" in value:
            head = json.dumps({k: v for k, v in value.items() if k != "arms"})
            arms = ",\n".join(json.dumps(arm) for arm in value["arms"])
            lines.append(f'"{name}": {head[:-1]}, "arms": [\n{arms}\n]}}')
        else:
            lines.append(f'"{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read_results(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Read result files."""
    return [json.loads(path.read_text("utf-8")) for path in paths]


def table(results: list[dict[str, Any]], role: str = "test") -> list[str]:
    """Return the lines of a Markdown table, one row for each arm of each result.

    Args:
        results: As read.
        role: `test` or `tune`.
    """
    lines = [
        "| task | arm | n | accuracy | minus reference | won, lost | McNemar p |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        for arm in result[role]["arms"]:
            lines.append(_row(result, arm, role))
    return lines


def nats_table(
    results: list[dict[str, Any]], which: str, role: str = "test"
) -> list[str]:
    """Return the lines of a table of right choices' log-likelihoods.

    They move where no answer changes, and so tell small effects that accuracy hides.

    Args:
        results: As read; of multiple choice.
        which: A name of `NATS`.
        role: `test` or `tune`.

    Raises:
        ValueError: a result does not have them.
    """
    lines = [
        f"| task | arm | n | {NATS[which]} | minus reference |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        arms = result[role]["arms"]
        if any(which not in arm for arm in arms):
            raise ValueError(f"the result of {result['task']} has no {which}")
        nats = {arm["name"]: np.array(arm[which]) for arm in arms}
        reference = nats[result["reference"]]
        for name, values in nats.items():
            cells = [result["task"], name, str(len(values)), f"{values.mean():.3f}", ""]
            if name != result["reference"]:
                cells[-1] = _difference(compare(values, reference))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _difference(against: dict[str, Any]) -> str:
    low, high = against["low"], against["high"]
    return f"{against['difference']:+.3f} ({low:+.3f}, {high:+.3f})"


def _row(result: dict[str, Any], arm: dict[str, Any], role: str) -> str:
    against = arm["against_reference"]
    score = f"{arm['accuracy']:.3f} ({arm['low']:.3f}, {arm['high']:.3f})"
    cells = [result["task"], arm["name"], str(arm["n"]), score]
    if arm["name"] == result["reference"]:
        cells += ["", "", ""]
    else:
        cells.append(_difference(against))
        binary = "p" in against
        cells.append(f"{against['won']}, {against['lost']}" if binary else "")
        cells.append(f"{against['p']:.2g}" if binary else "")
    return f"| {' | '.join(cells)} |"
