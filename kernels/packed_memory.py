# SPDX-License-Identifier: Apache-2.0
"""A layer's token memories as one block of numbers, for the kernels of a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

_AT_ONCE = 4096  # tokens


class StoredTokens(NamedTuple):
    """One layer of one memory as its store holds it; N tokens."""

    keys: torch.Tensor  # [N, H] f32 router inputs
    values: torch.Tensor  # [N, E] f32 assignments, 0 but for each token's experts


class PackedMemory(NamedTuple):
    """One layer's memories, one behind the other; N tokens in all, P places.

    Keys stay float32, half the bytes of the float64 that products are taken in: each
    widens to itself, and its length is divided out afterwards. A cosine is then that of
    `recall.LayerMemory` but for the rounding of float64.
    """

    keys: torch.Tensor  # [N, H] f32, not of length 1
    inverse_lengths: torch.Tensor  # [N] f64
    values: torch.Tensor  # [N, E] f32
    starts: torch.Tensor  # [P + 1] int64; place p, from 1, ends where p + 1 starts

    @property
    def searched(self) -> tuple[torch.Tensor, ...]:
        """What finding the nearest tokens reads."""
        return self.keys, self.inverse_lengths, self.starts

    @property
    def nbytes(self) -> int:
        """Bytes of device memory."""
        return sum(part.nbytes for part in self)


def pack(
    stored: Sequence[StoredTokens | None], device: torch.device | str
) -> PackedMemory:
    """Put memories together, by place from 1.

    Args:
        stored: `None` where a memory lacks this layer; at least one does not.
        device: Where the block shall live.
    """
    there = [one for one in stored if one is not None]
    keys, values = (_together([one[part] for one in there]) for part in (0, 1))
    # in float64, but not all at once
    lengths = torch.cat([part.double().norm(dim=1) for part in keys.split(_AT_ONCE)])
    counts = torch.tensor([0 if one is None else len(one.keys) for one in stored])
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return PackedMemory(
        *(part.to(device) for part in (keys, 1 / lengths, values, starts))
    )


def _together(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts)
