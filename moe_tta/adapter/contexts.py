# SPDX-License-Identifier: Apache-2.0
"""Token sequences of several requests as one right-padded batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Contexts(NamedTuple):
    """R sequences; padding stands after a sequence, where causal rows never look."""

    tokens: torch.Tensor  # [R, T] int64
    lengths: torch.Tensor  # [R] int64

    @staticmethod
    def of(sequences: Sequence[Sequence[int]], device: torch.device) -> Contexts:
        """Batch token ids; T is that of the longest."""
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        tokens = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        return Contexts(tokens.to(device), lengths.to(device))

    @property
    def positions(self) -> torch.Tensor:
        """Absolute positions [1, T]."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]


def causal_mask(
    length: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Return [1, 1, T, T] bool, or `None` where plain causal attention is meant."""
    if window is None or window >= length:
        return None
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
