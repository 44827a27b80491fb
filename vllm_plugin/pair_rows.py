# SPDX-License-Identifier: Apache-2.0
"""Combine the logits rows of pairs before sampling, in the worker."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from moe_tta.kernels.contrast import COMBINE
from moe_tta.vllm_plugin import compat
from moe_tta.vllm_plugin.pairs import Link


class Rows(NamedTuple):
    """Pairs of one combination: rows of the logits [P] int64, numbers [P, K] fp32."""

    leads: torch.Tensor
    followers: torch.Tensor
    numbers: torch.Tensor


class PairRows:
    """Follows the pairs of one model runner.

    A follower is remembered from its first scheduling to its end. The scheduler lets
    the two of a pair sample in the same step only; rows of a request that is still
    reading its prompt are combined too where both are in the step, and never used.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.links: dict[str, Link] = {}

    def requests_changed(self, finished: Iterable[str], new: Iterable[Any]) -> None:
        """Forget finished followers, remember new ones."""
        for request_id in finished:
            self.links.pop(request_id, None)
        for request in new:
            link = Link.read(request)
            if link is not None:
                self.links[request.req_id] = link

    def rows(self, req_ids: Sequence[str]) -> dict[str, Rows]:
        """Return the step's pairs by combination.

        Args:
            req_ids: The step's requests in the order of the logits rows.
        """
        if not self.links:
            return {}
        row_of = {request_id: row for row, request_id in enumerate(req_ids)}
        found = defaultdict(list)
        for follower, link in self.links.items():
            if follower in row_of and link.lead in row_of:
                pair = (row_of[link.lead], row_of[follower])
                found[link.combination].append((*pair, link.numbers))
        return {name: self._rows(pairs) for name, pairs in found.items()}

    def _rows(self, pairs: Sequence[tuple[int, int, tuple[float, ...]]]) -> Rows:
        leads, followers, numbers = zip(*pairs, strict=True)
        given = (
            np.array(leads, np.int64),
            np.array(followers, np.int64),
            np.array(numbers, np.float32),
        )
        return Rows(*(self._to_device(array) for array in given))

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        if self.device.type == "cpu":
            return torch.from_numpy(array)
        out = torch.empty(
            array.shape, dtype=torch.from_numpy(array).dtype, device=self.device
        )
        compat.copy_to_device(array, out)
        return out


def combine(logits: torch.Tensor, by_name: dict[str, Rows]) -> torch.Tensor:
    """Return logits [N, V] whose lead rows hold the combination of their pair.

    float32 where there are pairs: rounding to half precision would undo small betas.
    """
    if not by_name:
        return logits
    logits = logits.float()
    for name, rows in by_name.items():
        logits[rows.leads] = COMBINE[name](
            logits[rows.leads], logits[rows.followers], *rows.numbers.unbind(1)
        )
    return logits


def give_followers_tokens(sampled: torch.Tensor, by_name: dict[str, Rows]) -> None:
    """Overwrite the followers' rows of sampled tokens [N, 1] with their leads'."""
    for rows in by_name.values():
        sampled[rows.followers] = sampled[rows.leads]
