# SPDX-License-Identifier: Apache-2.0
"""Token sequences of several requests as one batch without padding.

All layers work on N rows, those of one text after those of another, and perhaps some
of nobody. Attention alone needs a text's rows apart from the others': for it they are
spread to [R, T], and its result is gathered again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable


class Packing(NamedTuple):
    """Where the rows [1, N] of R texts stand in attention's layout [R, T].

    Both moves copy. Backward, too, each number is read from one place: nothing is
    added, so that results repeat. Padding passes no gradient on: causal attention of
    real rows does not see it, and nothing reads its result. Numbers of one text never
    reach another, NaN included.
    """

    places: torch.Tensor  # [R, T] int64: row of a position; its text's last for padding
    columns: torch.Tensor  # [N] int64: index of R T for each row; 0 for nobody's
    padding: torch.Tensor  # [R, T] bool
    nobody: torch.Tensor  # [N] bool: rows of no text

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [R, T, ...] of rows [1, N, ...]; padding repeats its text's last row.

        One text as long as all rows is returned as it is, with nobody's as padding.
        """
        return rows if self._is_whole else _Spread.apply(rows, self)

    def gather(self, spread: torch.Tensor) -> torch.Tensor:
        """Return rows [1, N, ...] of [R, T, ...]; 0 in those of nobody.

        One text as long as all rows is returned as it is.
        """
        return spread if self._is_whole else _Gather.apply(spread, self)

    @property
    def _is_whole(self) -> bool:
        return self.places.shape == (1, len(self.columns))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.save_for_backward(*packing)
        return _at_places(rows, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _at_columns(grad, Packing(*ctx.saved_tensors)), None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spread: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.save_for_backward(*packing)
        return _at_columns(spread, packing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        packing = Packing(*ctx.saved_tensors)
        return _clear(_at_places(grad, packing), packing.padding), None


def _at_places(rows: torch.Tensor, packing: Packing) -> torch.Tensor:
    taken = rows[0].index_select(0, packing.places.flatten())
    return taken.unflatten(0, packing.places.shape)


def _at_columns(spread: torch.Tensor, packing: Packing) -> torch.Tensor:
    taken = spread.flatten(0, 1).index_select(0, packing.columns)
    return _clear(taken, packing.nobody)[None]


def _clear(values: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Set values to 0, in place; the mask is of their first dimensions."""
    return values.masked_fill_(where[(..., *[None] * (values.dim() - where.dim()))], 0)


class PackedTexts(NamedTuple):
    """R texts of N rows, nobody's included, which have token 0 and come last."""

    tokens: torch.Tensor  # [1, N] int64
    positions: torch.Tensor  # [1, N] int64, within each text; 0 for nobody's
    slots: torch.Tensor  # [N] int64: 1 + the text, or 0 before its start and for nobody
    lengths: torch.Tensor  # [R] int64
    packing: Packing

    @staticmethod
    def of(
        sequences: Sequence[Sequence[int]],
        device: torch.device,
        starts: Sequence[int] | None = None,
        extent: tuple[int, int] | None = None,
    ) -> PackedTexts:
        """Pack token ids; rows before a sequence's start keep the model's own rule.

        Args:
            sequences: Token ids, one or more of each.
            device: Of the result.
            starts: First row of each that takes the vectors; 0 by default.
            extent: (N, T), each as large as the texts need or larger; by default that
                large.
        """
        sizes = [len(sequence) for sequence in sequences]
        count, longest = extent or (sum(sizes), max(sizes))
        joined = [token for sequence in sequences for token in sequence]
        tokens = torch.tensor(joined + [0] * (count - len(joined))).to(device)
        lengths = torch.tensor(sizes).to(device)
        first = torch.tensor([0] * len(sizes) if starts is None else starts).to(device)
        return _pack(tokens, lengths, first, longest)

    @property
    def size(self) -> tuple[int, int, int]:
        """R, T and N."""
        return (*self.packing.places.shape, self.tokens.shape[1])

    def scored(self, skip: int) -> torch.Tensor:
        """Which positions predict a token that counts, [R, T] bool.

        Args:
            skip: Tokens at the head of a text that are context only.
        """
        following = 1 + torch.arange(self.size[1], device=self.tokens.device)
        return (following < self.lengths[:, None]) & (following >= skip)


def _pack(
    tokens: torch.Tensor, lengths: torch.Tensor, first: torch.Tensor, longest: int
) -> PackedTexts:
    """Lay out tokens [N] of texts of lengths [R]; nothing waits for the device."""
    rows = torch.arange(len(tokens), device=tokens.device)
    steps = torch.arange(longest, device=tokens.device)
    ends = lengths.cumsum(0)
    begins, last = ends - lengths, (lengths - 1)[:, None]
    nobody = rows >= ends[-1]
    owners = torch.searchsorted(ends, rows, right=True).clamp_max(len(lengths) - 1)
    positions = torch.where(nobody, 0, rows - begins[owners])
    packing = Packing(
        begins[:, None] + torch.minimum(steps, last),
        torch.where(nobody, 0, owners * longest + positions),
        steps > last,
        nobody,
    )
    takes = ~nobody & (positions >= first[owners])
    slots = torch.where(takes, 1 + owners, 0)
    return PackedTexts(tokens[None], positions[None], slots, lengths, packing)
