# SPDX-License-Identifier: Apache-2.0
"""Model cards: the recorded size and SHA-256 of every file of a lab model."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from moe_tta.lab.errors import LabError

LAB_DIR_VARIABLE = "MOE_TTA_LAB_DIR"
CHECKOUT_LAB = Path(__file__).parents[2] / "benchmarks" / "lab"
PACKAGED = Path(__file__).parent


@dataclass(frozen=True)
class Card:
    """What a lab model's folder must hold, and what it is built from."""

    model: str
    files: dict[str, dict]  # name: {"bytes": int, "sha256": str}
    inputs: dict[str, str]  # name of an input file: its sha256


def lab_dir() -> Path:
    """The folder with the trained differences, which the wheel does not carry.

    Raises:
        LabError: it is not there.
    """
    folder = Path(os.environ.get(LAB_DIR_VARIABLE) or CHECKOUT_LAB)
    if not folder.is_dir():
        raise LabError(
            f"{folder} does not exist. The trained expert differences are in the "
            "repository of moe-tta, not in its wheel: clone the repository and "
            f"install it from there with pip install -e, or set {LAB_DIR_VARIABLE} "
            "to the clone's benchmarks/lab folder."
        )
    return folder


def load_card(path: Path) -> Card:
    """Reads a card.

    Raises:
        LabError: there is none at `path`, or it lacks an entry.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Card(content["model"], content["files"], content["inputs"])
    except (OSError, ValueError, KeyError) as error:
        raise LabError(f"{path} is not a readable model card: {error!r}") from error
