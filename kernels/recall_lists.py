# SPDX-License-Identifier: Apache-2.0
"""Lists of nearest tokens: a cosine and a place in one integer, the nearest kept.

A list has no order. Of equal cosines the lower place is the higher integer, so that
what a list keeps does not depend on the order in which tokens come.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_tta.kernels.recall import GRID

_STEPS = tl.constexpr(int(GRID))
_PLACE_BITS = tl.constexpr(32)
_LAST_PLACE = tl.constexpr(2**32 - 1)
NO_TOKEN = tl.constexpr(-(2**62))  # below every entry of a list
_NO_ENTRY = tl.constexpr(2**62)  # above every token


@triton.jit
def join(steps, places, exists):
    """Return integers that order tokens by cosine, in steps of the grid, and place."""
    joined = ((steps + _STEPS) << _PLACE_BITS) | (_LAST_PLACE - places.to(tl.int64))
    return tl.where(exists, joined, NO_TOKEN)


@triton.jit
def steps_of(entries):
    """Return the cosines of entries that hold a token, in steps of the grid."""
    return (entries >> _PLACE_BITS) - _STEPS


@triton.jit
def places_of(entries):
    """Return the places of entries that hold a token."""
    return _LAST_PLACE - (entries & _LAST_PLACE)


@triton.jit
def empty_lists(wanted, columns):
    """Return lists for that many tokens: negative where there is none yet."""
    # each another one, so that `insert` replaces one at a time
    return tl.where(columns < wanted, -1 - columns.to(tl.int64), _NO_ENTRY)


@triton.jit
def insert(lists, tokens):
    """Put tokens [R, C] into lists [R, W], in place of the lowest entries."""
    highest = tl.max(tokens, axis=1)
    lowest = tl.min(lists, axis=1)
    more = tl.max((highest > lowest).to(tl.int32), axis=0) > 0
    while more:
        replaced = (lists == lowest[:, None]) & (highest > lowest)[:, None]
        lists = tl.where(replaced, highest[:, None], lists)
        tokens = tl.where(tokens == highest[:, None], NO_TOKEN, tokens)
        highest = tl.max(tokens, axis=1)
        lowest = tl.min(lists, axis=1)
        more = tl.max((highest > lowest).to(tl.int32), axis=0) > 0
    return lists


@triton.jit
def num_lists(
    tiles, CAPACITY: tl.constexpr, MAX_SPLITS: tl.constexpr, ROWS: tl.constexpr
):
    """Return into how many parts a memory is divided for that many tiles of rows."""
    return tl.minimum(MAX_SPLITS, CAPACITY // (tl.maximum(tiles, 1) * ROWS))


@triton.jit
def blocks_of_a_part(num_tokens, parts, BLOCK_N: tl.constexpr):
    """Return how many blocks of tokens each part has, the last ones fewer or none."""
    return tl.cdiv(tl.cdiv(num_tokens, BLOCK_N), parts)
