# SPDX-License-Identifier: Apache-2.0
"""The rounds of an API process's latest requests, for those who ask over HTTP."""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import Any

MAX_REQUESTS = 1024


class RoundRecords:
    """Reports by request and completion, the oldest request out first.

    Args:
        max_requests: How many requests are kept.
    """

    def __init__(self, max_requests: int = MAX_REQUESTS):
        self._max_requests = max_requests
        self._kept: OrderedDict[str, dict[int, list[dict[str, Any]]]] = OrderedDict()
        self._lock = Lock()

    def keep(
        self, request_id: str, index: int, reports: Sequence[dict[str, Any]]
    ) -> None:
        """Keep a completion's rounds so far.

        Args:
            request_id: As the server knows it: `cmpl-...-0` for a completion's first
                prompt, `chatcmpl-...`.
            index: Of the completion, 0 without `n`.
            reports: All of them.
        """
        with self._lock:
            self._kept.setdefault(request_id, {})[index] = list(reports)
            self._kept.move_to_end(request_id)
            while len(self._kept) > self._max_requests:
                self._kept.popitem(last=False)

    def find(self, response_id: str) -> list[dict[str, Any]]:
        """Return the completions of a response, one entry for each prompt and index.

        Args:
            response_id: The `id` of the body that the client got.
        """
        own = re.compile(re.escape(response_id) + r"(?:-(\d+))?")
        found = []
        with self._lock:
            for request_id, completions in self._kept.items():
                if match := own.fullmatch(request_id):
                    prompt = int(match[1] or 0)
                    found += [
                        {"prompt": prompt, "index": index, "rounds": rounds}
                        for index, rounds in completions.items()
                    ]
        return sorted(found, key=lambda entry: (entry["prompt"], entry["index"]))


of_process = functools.cache(RoundRecords)
