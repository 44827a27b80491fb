# SPDX-License-Identifier: Apache-2.0
"""Shards: safetensors files of which single rows are read.

Rows are read by `pread`, not through a memory map: a file that shrinks under a map
kills the process that touches it, and this process is a server.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from moe_tta.remix.errors import StoreError

_DTYPES = {"F32": np.float32, "F16": np.float16, "I64": np.int64}
_CHUNK = 1 << 20


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a safetensors file that appears whole or not at all."""
    partial = path.with_suffix(".partial")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, partial)
    os.replace(partial, path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, reading it in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_CHUNK):
            digest.update(piece)
    return digest.hexdigest()


class Shard:
    """An open safetensors file; threads may share it.

    Raises:
        StoreError: it is no safetensors file of dtypes a store uses.
    """

    def __init__(self, path: Path):
        self.path = path
        self._file = path.open("rb")
        try:
            size = self._read(0, 8)
            (header_bytes,) = struct.unpack("<Q", size)
            if header_bytes > path.stat().st_size:
                raise StoreError(f"{path}: its header leaves the file")
            self._header = json.loads(self._read(8, header_bytes))
            self._start = 8 + header_bytes
            self._dtypes = {n: _DTYPES[e["dtype"]] for n, e in self._tensors().items()}
        except (ValueError, KeyError, TypeError, AttributeError) as err:
            if isinstance(err, StoreError):
                raise
            raise StoreError(f"{path}: unreadable as safetensors: {err}") from err

    def _tensors(self) -> dict:
        return {n: e for n, e in self._header.items() if n != "__metadata__"}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape.

        Raises:
            StoreError: there is no such tensor.
        """
        if name not in self._dtypes:
            raise StoreError(f"{self.path}: holds no tensor {name!r}")
        return tuple(self._header[name]["shape"])

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's dtype."""
        self.shape(name)
        return np.dtype(self._dtypes[name])

    def rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Read rows `first .. first + count - 1` of a tensor.

        Raises:
            StoreError: the file no longer holds them.
        """
        _, *inner = self.shape(name)
        dtype = self.dtype(name)
        row_bytes = dtype.itemsize * math.prod(inner)
        begin = self._start + self._header[name]["data_offsets"][0]
        data = self._read(begin + first * row_bytes, count * row_bytes)
        return np.frombuffer(data, dtype).reshape(count, *inner)

    def _read(self, offset: int, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = os.pread(self._file.fileno(), size - len(data), offset + len(data))
            if not piece:
                raise StoreError(f"{self.path}: ends before byte {offset + size}")
            data += piece
        return data
