# SPDX-License-Identifier: Apache-2.0
"""Saved steering artefacts: a folder with a JSON card and a safetensors file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moe_tta import __version__
from moe_tta.plan import FIELDS
from moe_tta.shape import RouterShape

CARD_FILE = "config.json"
TENSORS_FILE = "steer.safetensors"
ARRAYS = ("allow", "bias", "promote", "demote", "scale", "drop")  # each [L, E]


class ArtefactError(ValueError):
    """An artefact that cannot be read, or does not fit the model."""


class ArtefactCard(BaseModel):
    """What a reader must know before using the arrays.

    `layers` are decoder-layer numbers, one per row of the arrays; `sha256` is that
    of the tensors file.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["moe-tta-steer-1"] = "moe-tta-steer-1"
    name: str
    description: str = ""
    base_model: str
    num_hidden_layers: int = Field(ge=1)
    layers: list[int] = Field(min_length=1)
    num_experts: int = Field(ge=1)
    created_by: str
    sha256: str


@dataclass(frozen=True, eq=False)
class Artefact:
    """A card and its arrays by plan field, each [L, E]."""

    card: ArtefactCard
    arrays: Mapping[str, np.ndarray]

    def check(self, shape: RouterShape) -> None:
        """Refuse a model of another shape.

        Raises:
            ArtefactError: names every difference.
        """
        pairs = {
            "num_hidden_layers": (self.card.num_hidden_layers, shape.num_hidden_layers),
            "layers": (self.card.layers, list(shape.layers)),
            "num_experts": (self.card.num_experts, shape.num_experts),
        }
        wrong = [
            f"{name} {mine} != {models}"
            for name, (mine, models) in pairs.items()
            if mine != models
        ]
        if wrong:
            raise ArtefactError(
                f"artefact {self.card.name!r} was made for {self.card.base_model}, "
                f"not this model: {'; '.join(wrong)}"
            )


def save_artefact(
    path: str | Path,
    arrays: Mapping[str, np.ndarray],
    *,
    shape: RouterShape,
    name: str,
    base_model: str,
    description: str = "",
) -> Artefact:
    """Write an artefact folder.

    Args:
        path: Folder; made if need be, an artefact in it is replaced.
        arrays: Any of `ARRAYS`, each [L, E], of the plan field's dtype.
        shape: The model the arrays were made for.
        name: Short name for people.
        base_model: Model id, such as `org/model`.
        description: What it does and how it was found.

    Raises:
        ArtefactError: an array is unknown, of another shape or dtype, or holds
            values no plan may hold.
    """
    want = (len(shape.layers), shape.num_experts)
    _check_arrays(arrays, want, name)
    data = save({key: np.ascontiguousarray(array) for key, array in arrays.items()})
    card = ArtefactCard(
        name=name,
        description=description,
        base_model=base_model,
        num_hidden_layers=shape.num_hidden_layers,
        layers=list(shape.layers),
        num_experts=shape.num_experts,
        created_by=f"moe-tta {__version__}",
        sha256=hashlib.sha256(data).hexdigest(),
    )
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TENSORS_FILE).write_bytes(data)
    (folder / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", "utf-8")
    return Artefact(card, dict(arrays))


def load_artefact(path: str | Path) -> Artefact:
    """Read an artefact folder; the tensors' hash must be the card's.

    Raises:
        ArtefactError: a file is missing, damaged or not ours.
    """
    folder = Path(path)
    card = _read_card(folder / CARD_FILE)
    source = folder / TENSORS_FILE
    data = _read(source)
    digest = hashlib.sha256(data).hexdigest()
    if digest != card.sha256:
        raise ArtefactError(
            f"{source}: sha256 is {digest}, the card says {card.sha256}: the file was "
            "damaged or changed"
        )
    try:
        arrays = load(data)
    except KeyError as err:
        raise ArtefactError(f"{source}: numpy has no dtype {err}") from err
    except (SafetensorError, ValueError, TypeError) as err:
        raise ArtefactError(f"{source}: unreadable as safetensors: {err}") from err
    _check_arrays(arrays, (len(card.layers), card.num_experts), str(source))
    return Artefact(card, arrays)


def _read(source: Path) -> bytes:
    try:
        return source.read_bytes()
    except OSError as err:
        raise ArtefactError(f"{source}: cannot be read: {err.strerror}") from err


def _read_card(source: Path) -> ArtefactCard:
    try:
        return ArtefactCard.model_validate_json(_read(source))
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "card"
        raise ArtefactError(f"{source}: {where}: {first['msg']}") from err


def _check_arrays(
    arrays: Mapping[str, np.ndarray], want: tuple[int, int], source: str
) -> None:
    if not arrays:
        raise ArtefactError(f"{source}: holds no array, expected any of {ARRAYS}")
    for name, array in arrays.items():
        if name not in ARRAYS:
            raise ArtefactError(f"{source}: unknown array {name!r}, expected {ARRAYS}")
        dtype = np.dtype(FIELDS[name][0])
        if array.shape != want or array.dtype != dtype:
            raise ArtefactError(
                f"{source}: {name} is {array.dtype} {array.shape}, expected {dtype} "
                f"{want}"
            )
        if not np.isfinite(array).all():
            raise ArtefactError(f"{source}: {name} holds values that are not finite")
        if name == "scale" and (array < 0).any():
            raise ArtefactError(f"{source}: scale holds a negative factor")
    if {"promote", "demote"} <= set(arrays):
        both = arrays["promote"] & arrays["demote"]
        if both.any():
            raise ArtefactError(f"{source}: an expert is both promoted and demoted")
