# SPDX-License-Identifier: Apache-2.0
"""Ranks, counts and noise for the routing kernel: `selection.py` and `noise.py` again.

Every function works on one row, with one lane per expert.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moe_tta.plan import Select

MODEL, _, TOP_P, RELATIVE, ABSOLUTE, ENTROPY, RANKS, SAMPLE = (
    tl.constexpr(select.value) for select in Select
)
INF = tl.constexpr(float("inf"))
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
UNRANKED = tl.constexpr(1 << 20)  # above every rank and every expert id
LOWEST = tl.constexpr(-(1 << 31))  # below every key of `ordered_bits`
_HALF_EVEN = tl.constexpr(1.5 * 2**23)  # adding it leaves no room for fractions
_STEP = tl.constexpr(2.0**-23)


@triton.jit
def ordered_bits(keys):
    """Return int32 that compare as torch sorts float32: -0 equals 0, NaN is highest."""
    bits = tl.where(keys == 0, 0.0, keys).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(keys != keys, 0x7FFFFFFF, bits)


@triton.jit
def highest(values):
    """Return the highest of float32 [n]: integers meet in one step, floats in five."""
    return _turn(tl.max(_turn(values.to(tl.int32, bitcast=True)), axis=0)).to(
        tl.float32, bitcast=True
    )


@triton.jit
def _turn(bits):
    """Map a float32's bits to an integer of the same order, or back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def at_rank(values, rank, wanted):
    """Return the float32 whose `rank` is the wanted one, 0 if none is."""
    bits = tl.where(rank == wanted, values.to(tl.int32, bitcast=True), LOWEST)
    return tl.max(bits, axis=0).to(tl.float32, bitcast=True)


@triton.jit
def rank_highest(ordered, ties, first, depth):
    """Rank the `depth` highest, ties by lowest `ties`, which are distinct numbers.

    Returns int32 ranks less `first`: those before it are negative, others UNRANKED.
    """
    rank = tl.full(ordered.shape, UNRANKED, tl.int32)
    for step in range(depth):
        best = tl.max(ordered, axis=0)
        pick = tl.min(tl.where(ordered == best, ties, UNRANKED), axis=0)
        rank = tl.where(ties == pick, step - first, rank)
        ordered = tl.where(ties == pick, LOWEST, ordered)
    return rank


@triton.jit
def count_ranks(shares, rank, select, arg0, arg1, k_min, k_max, most, log_e):
    """Return how many ranks the row's `Select` rule asks for, before its bounds."""
    count = k_max
    if select == TOP_P:
        count = k_max * 0 + 1
        mass = arg0 * 0.0
        for step in range(most):
            mass += at_rank(shares, rank, step)
            count += (mass <= arg0).to(tl.int32)
    if (select == RELATIVE) | (select == ABSOLUTE):
        best = at_rank(shares, rank, 0)
        least = tl.where(select == RELATIVE, arg0 * best, arg0)
        # rank 0 is used anyway; the first rank too low ends the run
        reaches = (rank <= 0) | (shares >= least)
        count = tl.min(tl.where(reaches, UNRANKED, rank), axis=0)
    if select == ENTROPY:
        logs = tl.log(tl.where(shares > 0, shares, 1.0))
        entropy = tl.sum(-shares * logs, axis=0) / log_e
        share = (entropy - arg0) / tl.maximum(arg1 - arg0, TINY)
        share = tl.minimum(tl.maximum(share, 0.0), 1.0)
        extra = (k_max - k_min).to(tl.float32) * share
        count = k_min + ((extra + _HALF_EVEN) - _HALF_EVEN).to(tl.int32)
    return count


@triton.jit
def redraw(rank, shares, noise, keep, pool, tau, most):
    """Rank anew behind `keep` by falling `ln p / tau + Gumbel`, up to `pool`."""
    gumbel = -tl.log(-tl.log(noise.to(tl.float64)))
    drawn = tl.log(shares.to(tl.float64)) / tau.to(tl.float64) + gumbel
    place = rank.to(tl.float32)
    keys = tl.where(place < pool, drawn.to(tl.float32), -INF)
    keys = tl.where(place < keep, INF, keys)
    ordered = tl.where(rank == UNRANKED, LOWEST, ordered_bits(keys))
    return rank_highest(ordered, rank, 0, most)


@triton.jit
def uniform(seed, layer, position, experts):
    """Return the float32 noise of `noise.uniform`, bit for bit."""
    state = _fold(seed.to(tl.uint32))
    state = _fold(state ^ (seed >> 32).to(tl.uint32))
    state = _fold(state ^ layer.to(tl.uint32))
    state = _fold(state ^ position.to(tl.uint32))
    state = _fold(state ^ experts.to(tl.uint32))
    return ((state >> 9).to(tl.float32) + 0.5) * _STEP


@triton.jit
def _fold(state):
    state += 0x9E3779B9
    state = (state ^ (state >> 16)) * 0x21F0AAAD
    state = (state ^ (state >> 15)) * 0xD35A2D97
    return state ^ (state >> 15)
