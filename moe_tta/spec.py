# SPDX-License-Identifier: Apache-2.0
"""The request object: parsing, and what a server lets clients send."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
from pydantic import StringConstraints

from moe_tta.errors import RequestError, did_you_mean, show
from moe_tta.spec_tree import PARAMETER, RequestSpec, from_tree

MAX_JSON_CHARS = 1 << 20  # a dense bias over 58 x 256 experts fits

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"  # of presets and artefacts

Name = Annotated[str, StringConstraints(pattern=NAME)]


def parse(value: Any, *, presets: Mapping[str, RequestSpec]) -> RequestSpec:
    """Read what a request carries under `moe_tta`.

    Args:
        value: A dict (offline), or a string: a JSON object where it starts with `{`,
            else the name of a preset. numpy numbers and arrays count as numbers
            and lists.
        presets: The operator's presets by name.

    Raises:
        RequestError: anything else; no other exception leaves this function.
    """
    return parse_text(as_text(value), presets=presets)


def as_text(value: Any) -> str:
    """Write what a request carries under `moe_tta` as HTTP would carry it.

    Equal texts mean equal requests.

    Raises:
        RequestError: it has no such form, or is too long.
    """
    if isinstance(value, Mapping):
        return _dump(value)
    if not isinstance(value, str):
        raise RequestError(
            f"expected an object or the name of a preset, got {show(value)}",
            PARAMETER,
            value,
        )
    if len(value) > MAX_JSON_CHARS and not _is_name(value):
        raise RequestError(
            f"expected at most {MAX_JSON_CHARS} characters, got {len(value)}",
            PARAMETER,
        )
    return value


def parse_text(text: str, *, presets: Mapping[str, RequestSpec]) -> RequestSpec:
    """Read what `as_text` wrote.

    Raises:
        RequestError: it is neither a request object nor the name of a preset.
    """
    if _is_name(text):
        return _preset(text, presets)
    return from_tree(_load(text))


def check_inline(spec: RequestSpec, allow_inline: bool) -> None:
    """Refuse edits of experts the client chose itself, unless the operator allows.

    A client must not be able to silence the experts that make a model safe. Presets
    and masks are the operator's own; dynamic_k and renorm name no expert.

    Raises:
        RequestError: the request edits experts inline and may not.
    """
    if allow_inline or spec.preset is not None:
        return
    for stream in (spec, spec.pair.weak) if spec.pair else (spec,):
        for name, params in stream.members.items():
            for member in params.inline_edits():
                raise RequestError(
                    "this server refuses inline expert edits; use a mask or preset "
                    "of the operator, who can also set allow_inline in "
                    "--additional-config",
                    f"{stream.root}.{name}.{member}",
                )


def _is_name(text: str) -> bool:
    return not text.lstrip().startswith("{")


def _preset(name: str, presets: Mapping[str, RequestSpec]) -> RequestSpec:
    if name not in presets:
        raise RequestError(
            f"unknown preset {show(name)}; {did_you_mean(name, presets)}",
            PARAMETER,
            name,
        )
    return presets[name]


def _load(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_no_repeats)
    except RecursionError:
        reason = "it is nested too deeply"
    except ValueError as err:
        reason = str(err)
    raise RequestError(f"expected a JSON object: {reason}", PARAMETER, text)


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in pairs:
        if key in tree:
            raise ValueError(f"key {show(key)} is given twice")
        tree[key] = value
    return tree


def as_json(value: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the same object with JSON types only.

    Raises:
        RequestError: something in it has no JSON form.
    """
    return _load(_dump(value))


def _dump(value: Mapping[Any, Any]) -> str:
    try:
        return json.dumps(dict(value), default=_plain)
    except RecursionError:
        reason = "it is nested too deeply"
    except (TypeError, ValueError) as err:
        reason = str(err)
    raise RequestError(f"expected what JSON can hold: {reason}", PARAMETER)


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} has no JSON form")
