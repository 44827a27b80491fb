# SPDX-License-Identifier: Apache-2.0
"""Which weights a model has: a fingerprint that takes seconds, not minutes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from moe_tta.remix.errors import StoreError

WHOLE_BYTES = 16 << 20  # files up to this size are hashed whole
BLOCKS, BLOCK_BYTES = 64, 64 << 10


def find_checkpoint(model: str, revision: str | None = None) -> Path:
    """Return the local folder of a model's checkpoint; nothing is downloaded.

    Args:
        model: A folder, or a name in the Hugging Face cache.
        revision: Of a name in the cache.

    Raises:
        StoreError: it is in neither place.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import LocalEntryNotFoundError

    try:
        found = snapshot_download(model, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError, HfHubHTTPError) as err:
        raise StoreError(
            f"{model}: neither a folder nor in the Hugging Face cache: {err}"
        ) from err
    return Path(found)


def weights_hash(folder: Path) -> str:
    """Return a SHA-256 over a checkpoint's safetensors files.

    Of each file: its name, size, header (names, shapes, dtypes and places of the
    tensors) and bytes; of a file over `WHOLE_BYTES`, `BLOCKS` blocks spread evenly over
    it. Weights that were trained further differ in nearly every block; a file with a
    few changed bytes may pass.

    Raises:
        StoreError: there is no safetensors file.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise StoreError(f"{folder}: holds no safetensors file to know its weights by")
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(json.dumps([path.name, size]).encode())
        with path.open("rb") as file:
            header_bytes = 8 + int.from_bytes(file.read(8), "little")
            file.seek(0)
            if size <= WHOLE_BYTES:
                digest.update(file.read())
                continue
            digest.update(file.read(min(header_bytes, size)))
            for block in range(BLOCKS):
                file.seek((size - BLOCK_BYTES) * block // (BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
