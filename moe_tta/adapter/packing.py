# SPDX-License-Identifier: Apache-2.0
"""Token sequences of several requests as one batch without padding.

All layers work on N rows, those of one text after those of another, and perhaps some
of nobody. Attention alone needs a text's rows apart from the others': for it they are
spread to [R, T], and its result is gathered again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from moe_tta.kernels import take_rows


class Packing(NamedTuple):
    """Where the rows [1, N] of R texts stand in attention's layout [R, T].

    Both moves copy, and so do their gradients: nothing is added, so that results
    repeat. What is padding in one layout, or nobody's in the other, is 0 after a move
    and passes no gradient on: numbers of one text never reach another, NaN included.
    """

    places: torch.Tensor  # [R, T] int64: row of a position; -1 for padding
    columns: torch.Tensor  # [N] int64: index of R T for each row; -1 for nobody's

    def spread(self, rows: torch.Tensor) -> torch.Tensor:
        """Return [R, T, ...] of rows [1, N, ...].

        One text as long as all rows is returned as it is, with nobody's as padding.
        """
        if self._is_whole:
            return rows
        return _Move.apply(rows, self.places, self.columns[None])

    def gather(self, spread: torch.Tensor) -> torch.Tensor:
        """Return rows [1, N, ...] of [R, T, ...].

        One text as long as all rows is returned as it is.
        """
        if self._is_whole:
            return spread
        return _Move.apply(spread, self.columns[None], self.places)

    @property
    def _is_whole(self) -> bool:
        return self.places.shape == (1, len(self.columns))


class _Move(torch.autograd.Function):
    """From one layout to another, whose numbers in the first are `index`."""

    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, index: torch.Tensor, back: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(back)
        return _take(values, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (back,) = ctx.saved_tensors
        return _take(grad, back), None, None


def _take(values: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return [..., W...] of values [A, B, W...] at an index of A B."""
    take = _taker(values.device)
    return take(values.flatten(0, 1), index.flatten()).unflatten(0, index.shape)


def _taker(device: torch.device) -> Callable[..., torch.Tensor]:
    """Return the kernel's `take_rows` on a GPU, and the plain one elsewhere."""
    if device.type != "cuda":
        return take_rows.take_rows
    from moe_tta.kernels import take_rows_triton

    return take_rows_triton.take_rows


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

    @property
    def targets(self) -> torch.Tensor:
        """The token that follows each row, [N]; any where none of its text does."""
        return self.tokens.roll(-1, dims=1).reshape(-1)

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
    begins = ends - lengths
    nobody = rows >= ends[-1]
    owners = torch.searchsorted(ends, rows, right=True).clamp_max(len(lengths) - 1)
    positions = torch.where(nobody, 0, rows - begins[owners])
    packing = Packing(
        torch.where(steps < lengths[:, None], begins[:, None] + steps, -1),
        torch.where(nobody, -1, owners * longest + positions),
    )
    takes = ~nobody & (positions >= first[owners])
    slots = torch.where(takes, 1 + owners, 0)
    return PackedTexts(tokens[None], positions[None], slots, lengths, packing)
