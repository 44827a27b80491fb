# SPDX-License-Identifier: Apache-2.0
"""Combine the logits rows of pairs before sampling, in the worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_tta.kernels.contrast import COMBINE
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.pairs import Link

# f(logits [N, V], out [N, V] float32, leads, followers, *numbers): overwrites the
# leads' rows of `out`, which may be `logits`
CombineRows = Callable[..., None]


class Rows(NamedTuple):
    """Pairs of one combination: rows of the logits [P] int64, K numbers [P] fp32."""

    leads: torch.Tensor
    followers: torch.Tensor
    numbers: tuple[torch.Tensor, ...]


class PairRows:
    """Follows the pairs of one model runner.

    A follower is remembered from its first scheduling to its end. The scheduler lets
    the two of a pair sample in the same step only; rows of a request that is still
    reading its prompt are combined too where both are in the step, and never used.

    Args:
        device: Where the logits are.
        combine_rows: By the names in `COMBINE`.
    """

    def __init__(self, device: torch.device, combine_rows: dict[str, CombineRows]):
        self.device = device
        self.links: dict[str, Link] = {}
        self._combine_rows = combine_rows
        # of the last step: while the batch stays, nothing is copied to the device
        self._req_ids: list[str] | None = None
        self._rows: dict[str, Rows] = {}

    def requests_changed(self, finished: Iterable[str], new: Iterable[Any]) -> None:
        """Forget finished followers, remember new ones."""
        for request_id in finished:
            if self.links.pop(request_id, None) is not None:
                self._req_ids = None
        for request in new:
            link = Link.read(request)
            if link is not None:
                self.links[request.req_id] = link
                self._req_ids = None

    def rows(self, req_ids: Sequence[str]) -> dict[str, Rows]:
        """Return the step's pairs by combination.

        Args:
            req_ids: The step's requests in the order of the logits rows.
        """
        if not self.links:
            return {}
        if req_ids != self._req_ids:
            self._rows = self._find(req_ids)
            self._req_ids = list(req_ids)  # vLLM changes its list in place
        return self._rows

    def _find(self, req_ids: Sequence[str]) -> dict[str, Rows]:
        row_of = {request_id: row for row, request_id in enumerate(req_ids)}
        found = defaultdict(list)
        for follower, link in self.links.items():
            if follower in row_of and link.lead in row_of:
                pair = (row_of[link.lead], row_of[follower])
                found[link.combination].append((*pair, link.numbers))
        return {name: self._to_rows(pairs) for name, pairs in found.items()}

    def _to_rows(self, pairs: Sequence[tuple[int, int, tuple[float, ...]]]) -> Rows:
        leads, followers, numbers = zip(*pairs, strict=True)
        rows = self._to_device(np.array([leads, followers], np.int64))
        columns = np.ascontiguousarray(np.array(numbers, np.float32).T)
        return Rows(*rows.unbind(), self._to_device(columns).unbind())

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        source = torch.from_numpy(array)
        if self.device.type == "cpu":
            return source
        out = torch.empty(array.shape, dtype=source.dtype, device=self.device)
        compat.copy_to_device(array, out)
        return out

    def combine(self, logits: torch.Tensor, by_name: dict[str, Rows]) -> torch.Tensor:
        """Return logits [N, V] whose lead rows hold the combination of their pair.

        float32 where there are pairs: rounding to half precision would undo small
        betas. float32 logits are changed in place.
        """
        if not by_name:
            return logits
        out = logits.float()
        for name, rows in by_name.items():
            given = rows.leads, rows.followers, *rows.numbers
            self._combine_rows[name](logits, out, *given)
        return out


def give_followers_tokens(sampled: torch.Tensor, by_name: dict[str, Rows]) -> None:
    """Overwrite the followers' rows of sampled tokens [N, 1] with their leads'."""
    for rows in by_name.values():
        sampled.index_copy_(0, rows.followers, sampled.index_select(0, rows.leads))


def plain_torch() -> dict[str, CombineRows]:
    """Return the laws of `COMBINE`, in place."""
    return {name: _in_place(law) for name, law in COMBINE.items()}


def _in_place(law: Callable[..., torch.Tensor]) -> CombineRows:
    def combine_rows(logits, out, leads, followers, *numbers):
        out[leads] = law(logits[leads], logits[followers], *numbers)

    return combine_rows


def kernels(
    max_pairs: int, vocab_size: int, device: torch.device
) -> dict[str, CombineRows]:
    """Return the Triton kernels of the same names, their memory allocated."""
    from moe_tta.kernels.contrast_triton import COMBINE_ROWS

    return {
        name: kind(max_pairs, vocab_size, device) for name, kind in COMBINE_ROWS.items()
    }
