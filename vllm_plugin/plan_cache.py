# SPDX-License-Identifier: Apache-2.0
"""Plans of requests seen before, so that each body is compiled once."""

from __future__ import annotations

import sys
from collections import OrderedDict
from threading import Lock

from moe_tta.compiled import CompiledRequest

MAX_BYTES = 64 << 20
ENTRY_BYTES = 4 << 10  # Python objects of one entry; 1.4 KiB measured for one plan


class PlanCache:
    """Compiled requests by the text that asked for them, least recently used out first.

    The key is the text as it came, not a canonical form: only parsing can tell two
    texts of one meaning, and equal plans share slots and KV by fingerprint anyway.
    Nothing stored changes, so that threads may share it.

    Args:
        max_bytes: Bound of what is kept; a request larger than it is not stored.
    """

    def __init__(self, max_bytes: int = MAX_BYTES):
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._kept: OrderedDict[str, tuple[CompiledRequest, int]] = OrderedDict()
        self._lock = Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, text: str) -> CompiledRequest | None:
        """Return what `text` was compiled to, if it is known."""
        with self._lock:
            if text not in self._kept:
                return None
            self._kept.move_to_end(text)
            return self._kept[text][0]

    def put(self, text: str, compiled: CompiledRequest) -> None:
        """Keep what `text` was compiled to."""
        size = ENTRY_BYTES + sys.getsizeof(text) + compiled.nbytes
        with self._lock:
            if text in self._kept or size > self.max_bytes:
                return
            self._kept[text] = compiled, size
            self.used_bytes += size
            while self.used_bytes > self.max_bytes:
                _, (_, freed) = self._kept.popitem(last=False)
                self.used_bytes -= freed
