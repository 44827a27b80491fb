# SPDX-License-Identifier: Apache-2.0
"""The cache folder: models appear in it whole and verified, or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from moe_tta.lab.cards import Card
from moe_tta.lab.errors import LabError
from moe_tta.lab.fetch import check_sha256, sha256

CACHE_VARIABLE = "MOE_TTA_CACHE"
MARKER = "lab.json"  # written last, once every hash was checked


def default_cache() -> Path:
    """``$MOE_TTA_CACHE``, or ``moe-tta`` in the user's XDG cache folder."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moe-tta"


def inventory(folder: Path) -> dict[str, dict]:
    """Size in bytes and SHA-256 of every file of a folder, as cards record them."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
        if path.name != MARKER
    }


def check_files(folder: Path, card: Card) -> None:
    """Hashes every file of a model.

    Raises:
        LabError: a file is missing, not on the card, or has another hash.
    """
    present = {path.name for path in folder.iterdir()} - {MARKER}
    if odd := present ^ set(card.files):
        raise LabError(f"{folder}: files missing or not on the card: {sorted(odd)}")
    for name, entry in card.files.items():
        check_sha256(folder / name, entry["sha256"])


def is_built(folder: Path, card: Card) -> bool:
    """Whether `folder` was verified against this card and its sizes still agree."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in card.files}
    except (FileNotFoundError, ValueError):
        return False
    expected = {name: entry["bytes"] for name, entry in card.files.items()}
    return marker == card.files and sizes == expected


def install(target: Path, card: Card, write: Callable[[Path], None]) -> None:
    """Writes a model into a temporary folder, verifies it and moves it into place.

    An interrupted or failed build leaves nothing under the final name.

    Args:
        target: the model's folder; an older model there is replaced.
        card: what the files must be.
        write: fills the folder it is given.

    Raises:
        LabError: the files differ from the card.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}-"
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as scratch:
        folder = Path(scratch) / "model"
        folder.mkdir()
        write(folder)
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors writes files for their owner alone
        check_files(folder, card)
        (folder / MARKER).write_text(json.dumps(card.files), encoding="utf-8")
        if target.exists():
            os.replace(target, Path(scratch) / "replaced")
        try:
            os.replace(folder, target)
        except OSError:  # another process has put the same model there meanwhile
            if not is_built(target, card):
                raise
