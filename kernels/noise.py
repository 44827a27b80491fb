# SPDX-License-Identifier: Apache-2.0
"""Counter-based noise: the same (seed, layer, position, expert) gives the same bits."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9
_FIRST = 0x21F0AAAD
_SECOND = 0xD35A2D97


def uniform(
    seed: torch.Tensor, layer: int, position: torch.Tensor, num_experts: int
) -> torch.Tensor:
    """Return noise that depends on nothing but its four numbers.

    Each number is folded into a 32-bit state by `mix((state ^ number) + golden)`, in
    the order seed low, seed high, layer, position, expert; the top 23 bits give the
    uniform. Everything is integer arithmetic, so any kernel can repeat it bit for bit.

    Source: the mixer is lowbias32 with constants 16 21f0aaad 15 d35a2d97 15
    (hash-prospector); the use is Expert-Sample, arXiv 2602.02443.

    Args:
        seed: [T] int64.
        layer: Decoder-layer number.
        position: [T] int64 absolute positions.
        num_experts: E.

    Returns:
        [T, E] float32 in the open interval (0, 1), multiples of 2^-24.
    """
    state = _fold(torch.zeros_like(seed), seed & _MASK)
    state = _fold(state, (seed >> 32) & _MASK)
    state = _fold(state, torch.full_like(seed, layer))
    state = _fold(state, position.long() & _MASK)
    experts = torch.arange(num_experts, device=seed.device)
    state = _fold(state[:, None], experts)
    return ((state >> 9).float() + 0.5) * 2.0**-23


def _fold(state: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    state = ((state ^ number) + _GOLDEN) & _MASK
    state = _multiply(state ^ (state >> 16), _FIRST)
    state = _multiply(state ^ (state >> 15), _SECOND)
    return state ^ (state >> 15)


def _multiply(state: torch.Tensor, constant: int) -> torch.Tensor:
    # a constant of 2^31 or more enters as its negative residue: no int64 overflow
    if constant >= 1 << 31:
        constant -= 1 << 32
    return (state * constant) & _MASK
