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
    starts: torch.Tensor  # [R] int64, first row that takes the request's vectors

    @staticmethod
    def of(
        sequences: Sequence[Sequence[int]],
        device: torch.device,
        starts: Sequence[int] | None = None,
        length: int | None = None,
    ) -> Contexts:
        """Batch token ids; rows before a sequence's start keep the model's own rule.

        Args:
            sequences: Token ids.
            device: Of the result.
            starts: First row of each that takes the vectors; 0 by default.
            length: T; by default that of the longest.
        """
        longest = max(len(sequence) for sequence in sequences)
        tokens = torch.zeros(len(sequences), length or longest, dtype=torch.int64)
        for row, sequence in zip(tokens, sequences, strict=True):
            row[: len(sequence)] = torch.tensor(sequence)
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        first = torch.tensor(starts if starts is not None else [0] * len(sequences))
        return Contexts(tokens.to(device), lengths.to(device), first.to(device))

    @property
    def positions(self) -> torch.Tensor:
        """Absolute positions [1, T]."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)[None]

    @property
    def real(self) -> torch.Tensor:
        """Which rows are no padding, [R, T] bool."""
        return self.positions < self.lengths[:, None]

    def slots(self) -> torch.Tensor:
        """Slot of each row [R T]: 1 + its request, or 0 before the start and after."""
        own = 1 + torch.arange(len(self.lengths), device=self.tokens.device)[:, None]
        takes = self.real & (self.positions >= self.starts[:, None])
        return torch.where(takes, own, 0).reshape(-1)

    def scored(self, skip: int) -> torch.Tensor:
        """Which rows predict a token that counts, [R, T] bool.

        Args:
            skip: Tokens at the head of a sequence that are context only.
        """
        following = self.positions + 1
        return (following < self.lengths[:, None]) & (following >= skip)


def causal_mask(
    length: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """Return [1, 1, T, T] bool, or `None` where plain causal attention is meant."""
    if window is None or window >= length:
        return None
    distance = torch.arange(length, device=device)
    distance = distance[:, None] - distance[None, :]
    return ((distance >= 0) & (distance < window))[None, None]
