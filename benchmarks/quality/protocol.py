# SPDX-License-Identifier: Apache-2.0
"""A command from its arms to its result: tune, choose, test, write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.overhead.models import Model
from benchmarks.overhead.record import conditions
from benchmarks.quality.arms import PLAIN, Arm
from benchmarks.quality.judges import judge_for
from benchmarks.quality.report import flags_of, write_result
from benchmarks.quality.study import ask, check, folder_of, write_down
from benchmarks.quality.tasks import find_task


def follow(
    args: argparse.Namespace,
    families: Mapping[str, Sequence[Arm]],
    published: Arm,
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Let all arms answer the tuning part and the chosen ones the test part.

    With `--write-only` all of them answer both parts, and nothing is judged: the same
    command without it does that later from the journals, on this machine or another.

    Args:
        args: All options.
        families: Arms by family; one of each is chosen.
        published: Tested as it is.
        settings: More of the operator's settings for vLLM.
    """
    task, model = find_task(args.task), Model.find(str(args.model))
    args.k_max = args.k_max or model.shape.top_k
    shape = replace(model.shape, k_max=args.k_max)
    given = {name: found for name, found in families.items() if found}
    tuned_arms = [arm for found in given.values() for arm in found]
    everyone = [*tuned_arms, published]
    for arm in everyone:
        arm.compiled(shape)  # refuses what the model cannot do before anything runs
    with judge_for(task, args, shape, everyone, settings) as judge:
        check(args, task, task.tune, tuned_arms, judge)
        check(args, task, task.test, everyone, judge)
        if args.write_only:
            write_down(args, task, task.tune, tuned_arms, judge)
            write_down(args, task, task.test, everyone, judge)
            _note_machine(args, model)
            return
        tuned = ask(args, task, task.tune, tuned_arms, judge)
        chosen = [tuned.best(name) for name in given]
        tested = ask(args, task, task.test, [*chosen, published], judge)
    parts = {"tune": tuned, "test": tested}
    write_result(args, model, parts, PLAIN, _written_by(args))


def _note_machine(args: argparse.Namespace, model: Model) -> None:
    path = _machine_file(args)
    path.write_text(json.dumps(conditions(flags_of(args), model)) + "\n")
    print(f"wrote every answer into {path.parent}; judge without --write-only")


def _written_by(args: argparse.Namespace) -> dict[str, Any]:
    """Say where the answers come from, if not from the run that judges them."""
    path = _machine_file(args)
    return {"written_by": json.loads(path.read_text())} if path.exists() else {}


def _machine_file(args: argparse.Namespace) -> Path:
    return folder_of(args) / "written.json"
