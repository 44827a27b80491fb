# SPDX-License-Identifier: Apache-2.0
"""The vLLM functions that pairs and rounds rely on, pinned by their source's hash.

Both depend on the order in which vLLM's scheduler asks its own methods. A vLLM that
changed one of them may still work, but nobody has looked: both are switched off there.
After looking, write the hashes anew with `python -m moe_tta.vllm_plugin.upstream`.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable
from pathlib import Path

PINS = Path(__file__).with_name("upstream.json")


def source_hashes(names: Iterable[str]) -> dict[str, str | None]:
    """Hash functions' sources without importing them.

    Args:
        names: As `vllm.module:Class.method` or `vllm.module:function`.

    Returns:
        The first 16 hex digits of SHA-256 by name; `None` for what does not exist.
    """
    return {name: _hash(*name.split(":")) for name in names}


def _hash(module: str, path: str) -> str | None:
    text = _text(module)
    node = ast.parse("") if text is None else _tree(text)
    for part in path.split("."):
        node = next(
            (n for n in node.body if getattr(n, "name", None) == part),
            None,
        )
        if node is None:
            return None
    source = ast.get_source_segment(text, node)
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def _text(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None
    return None if spec is None else Path(spec.origin).read_text()


@functools.lru_cache(maxsize=2)
def _tree(text: str) -> ast.Module:
    return ast.parse(text)


@functools.cache
def changed() -> tuple[str, ...]:
    """Return the pinned functions whose source differs in the installed vLLM."""
    pins = json.loads(PINS.read_text())
    found = source_hashes(pins)
    return tuple(name for name in pins if found[name] != pins[name])


if __name__ == "__main__":
    pins = json.loads(PINS.read_text())
    PINS.write_text(json.dumps(source_hashes(pins), indent=2) + "\n")
    sys.stdout.write(f"wrote {len(pins)} hashes to {PINS.name}\n")
