# SPDX-License-Identifier: Apache-2.0
"""The one error a request can cause, and how pydantic's errors become it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

SHOWN = 80  # characters of a user's value or key that a message repeats

# pydantic error type -> what was expected, where pydantic's own words are unclear
_EXPECTED = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "tuple_type": "a list",
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "string_unicode": "a string",
    "finite_number": "a finite number",
    "string_pattern_mismatch": "a name (letters, digits and . _ -, at most 64)",
}


class RequestError(ValueError):
    """A request that cannot be honoured.

    Attributes:
        message: What was expected and what was given, one sentence.
        parameter: Dotted path from the user's view (`moe_tta.steer.promote[2]`).
        value: The given value as JSON, at most `SHOWN` characters, or `None`.
    """

    def __init__(self, message: str, parameter: str, value: Any = None):
        super().__init__(message, parameter)
        self.message = message
        self.parameter = parameter
        self.value = None if value is None else show(value)

    def __str__(self) -> str:
        return f"{self.parameter}: {self.message}"

    def under(self, root: str) -> RequestError:
        """Return the same error with `root` put before the parameter's path."""
        moved = RequestError(self.message, join_path(root, [self.parameter]))
        moved.value = self.value
        return moved

    def renamed(self, paths: Mapping[str, str]) -> RequestError:
        """Return the same error with its path as the user wrote it, if it differs."""
        moved = RequestError(self.message, paths.get(self.parameter, self.parameter))
        moved.value = self.value
        return moved


def show(value: Any) -> str:
    """Write a user's value as ASCII JSON of at most `SHOWN` characters."""
    if isinstance(value, str):
        value = value[: SHOWN + 1]
    try:
        text = json.dumps(value, default=repr)
    except (ValueError, TypeError, RecursionError):
        text = f"a {type(value).__name__} that is not JSON"
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def join_path(root: str, parts: Sequence[str | int]) -> str:
    """Write `("steer", "promote", 2)` as `root.steer.promote[2]`, ASCII only."""
    path = root
    for part in parts:
        if isinstance(part, int):
            path += f"[{part}]"
        elif re.fullmatch(r"[\w.\[\]-]{1,80}", part, re.ASCII):
            path += f".{part}"
        else:
            path += f"[{show(part)}]"
    return path


def did_you_mean(name: str, known: Collection[str]) -> str:
    """List what is known, the nearest name first in words."""
    near = difflib.get_close_matches(name[:SHOWN], known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"{hint}known: {', '.join(sorted(known)) or 'none'}"


def from_validation(
    error: ValidationError,
    root: str,
    members: Callable[[tuple[str | int, ...]], Collection[str]],
) -> RequestError:
    """Turn pydantic's first complaint into a `RequestError`.

    Args:
        error: What pydantic raised.
        root: Path of the validated object.
        members: Gives the names an object at a location may hold.
    """
    first = error.errors(include_url=False)[0]
    loc = first["loc"]
    if loc[-1:] == ("[key]",) and first["type"] != "extra_forbidden":
        loc = loc[:-1]  # pydantic's mark of a wrong key of a dict
    value = first["input"]
    inner = first.get("ctx", {}).get("error")
    if isinstance(inner, RequestError):
        path = join_path(root, loc) + inner.parameter.removeprefix("moe_tta")
        return RequestError(inner.message, path)
    if first["type"] == "extra_forbidden":
        hint = did_you_mean(str(loc[-1]), members(loc[:-1]))
        message = f"unknown member {show(loc[-1])}; {hint}"
    elif first["type"] == "missing":
        message = "is missing"
    elif first["type"] in _EXPECTED:
        message = f"expected {_EXPECTED[first['type']]}, got {show(value)}"
    else:
        message = first["msg"].replace("Input should be ", "expected ")
        if message.startswith("expected"):
            message += f", got {show(value)}"
    return RequestError(message, join_path(root, loc), value)
