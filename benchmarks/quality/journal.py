# SPDX-License-Identifier: Apache-2.0
"""Outcomes as they come, one JSON line each, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Hashable
from pathlib import Path
from typing import Any


class Journal:
    """An append-only file of outcomes by key.

    The first line says what the outcomes were made with; another run's file is not
    mixed into this one's.

    Args:
        path: The file; made with its folders if it is not there.
        made_with: What must be equal for outcomes to be comparable, as JSON types.

    Raises:
        ValueError: the file was made with something else, or a line is broken in a
            place other than the end.
    """

    def __init__(self, path: Path, made_with: dict[str, Any]):
        self.path = path
        self.outcomes: dict[Hashable, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().split(b"\n") if path.exists() else []
        whole = lines[:-1]  # what follows the last newline was cut off by a kill
        if not whole:
            path.write_text(json.dumps(made_with) + "\n")
            return
        if json.loads(whole[0]) != made_with:
            raise ValueError(
                f"{path} is of another run: {_difference(whole[0], made_with)}"
            )
        if lines[-1]:
            with path.open("r+b") as file:
                file.truncate(sum(len(line) + 1 for line in whole))
        for line in whole[1:]:
            *key, outcome = json.loads(line)
            self.outcomes[tuple(key)] = outcome

    def add(self, key: tuple[Any, ...], outcome: Any) -> None:
        """Write an outcome down.

        Args:
            key: JSON types.
            outcome: JSON types.
        """
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([*key, outcome]) + "\n")
        self.outcomes[key] = outcome

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self.outcomes

    def __getitem__(self, key: tuple[Any, ...]) -> Any:
        return self.outcomes[key]


def _difference(line: bytes, made_with: dict[str, Any]) -> str:
    found = json.loads(line)
    names = sorted(
        name
        for name in found.keys() | made_with.keys()
        if found.get(name) != made_with.get(name)
    )
    return f"{', '.join(names)} differ; name another --work folder or remove it"
