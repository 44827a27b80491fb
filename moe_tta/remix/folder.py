# SPDX-License-Identifier: Apache-2.0
"""What folders of both kinds share: a card that names every file, its size and hash."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from moe_tta.remix.card import CARD_FILE, FileCard, ModelCard, StoreCard, TokenCard
from moe_tta.remix.errors import StoreError
from moe_tta.remix.shards import sha256


def read_card(folder: Path) -> StoreCard | TokenCard:
    """Read a store's card, of the kind that it says it is.

    Raises:
        StoreError: it is missing, no card, or names layers the model does not have.
    """
    source = folder / CARD_FILE
    try:
        text = source.read_bytes()
        kind = TokenCard if _format(text) == TokenCard.FORMAT else StoreCard
        card = kind.model_validate_json(text)
    except OSError as err:
        raise StoreError(f"{source}: cannot be read: {err.strerror}") from err
    except ValidationError as err:
        first = err.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "card"
        raise StoreError(f"{source}: {where}: {first['msg']}") from err
    wrong = set(card.layers) - set(card.model.moe_layers)
    if wrong or card.layers != sorted(set(card.layers)):
        raise StoreError(f"{source}: layers {card.layers} are not the model's")
    return card


def _format(text: bytes) -> str | None:
    try:
        return json.loads(text).get("format")
    except (ValueError, AttributeError):  # the card's own checks say what is wrong
        return None


def write_card(folder: Path, card: StoreCard | TokenCard) -> None:
    """Write the card, last of a folder's files."""
    text = card.model_dump_json(indent=2) + "\n"
    partial = folder / f"{CARD_FILE}.partial"
    partial.write_text(text, "utf-8")
    os.replace(partial, folder / CARD_FILE)


def describe_files(folder: Path) -> dict[str, FileCard]:
    """Return size and hash of every file of a folder, for its card."""
    return {
        path.name: FileCard(bytes=path.stat().st_size, sha256=sha256(path))
        for path in sorted(folder.iterdir())
    }


def check_files(folder: Path, files: Mapping[str, FileCard], names: set[str]) -> None:
    """Compare every file's size and hash with the card.

    Args:
        folder: The store.
        files: What the card says.
        names: The files that such a store has.

    Raises:
        StoreError: the card lists others, or one is missing or damaged.
    """
    if set(files) != names:
        raise StoreError(f"{folder / CARD_FILE}: lists other files than a store has")
    for name, entry in files.items():
        try:
            size = (folder / name).stat().st_size
            if size != entry.bytes:
                raise StoreError(
                    f"{folder / name}: {size} bytes, the card says {entry.bytes}"
                )
            digest = sha256(folder / name)
        except OSError as err:
            raise StoreError(
                f"{folder / name}: cannot be read: {err.strerror}"
            ) from err
        if digest != entry.sha256:
            raise StoreError(
                f"{folder / name}: sha256 is {digest}, the card says {entry.sha256}: "
                "the file was damaged or changed"
            )


def check_model(folder: Path, mine: ModelCard, model: ModelCard) -> None:
    """Refuse a model other than the one a store was made for.

    Raises:
        StoreError: names every difference.
    """
    if difference := mine.difference(model):
        raise StoreError(
            f"{folder}: made for {mine.name}, not for this model: {difference}"
        )
