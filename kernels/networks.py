# SPDX-License-Identifier: Apache-2.0
"""Networks that put eight integers in falling order, elementwise over tensors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sort8(a, b, c, d, e, f, g, h):
    """Sort with 19 comparators.

    Source: Batcher, "Sorting networks and their applications", AFIPS 1968.
    """
    a, b = _order(a, b)
    c, d = _order(c, d)
    e, f = _order(e, f)
    g, h = _order(g, h)
    a, c = _order(a, c)
    b, d = _order(b, d)
    e, g = _order(e, g)
    f, h = _order(f, h)
    b, c = _order(b, c)
    f, g = _order(f, g)
    a, e = _order(a, e)
    b, f = _order(b, f)
    c, g = _order(c, g)
    d, h = _order(d, h)
    c, e = _order(c, e)
    d, f = _order(d, f)
    b, c = _order(b, c)
    d, e = _order(d, e)
    f, g = _order(f, g)
    return a, b, c, d, e, f, g, h


@triton.jit
def merge8(a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7):
    """Return the eight highest of two sorted eights, sorted.

    The higher of each from the front and each from the back are the eight highest,
    rising and then falling or the like, so that three rounds of a bitonic merge sort
    them.
    """
    a, e = _order(tl.maximum(a0, b7), tl.maximum(a4, b3))
    b, f = _order(tl.maximum(a1, b6), tl.maximum(a5, b2))
    c, g = _order(tl.maximum(a2, b5), tl.maximum(a6, b1))
    d, h = _order(tl.maximum(a3, b4), tl.maximum(a7, b0))
    a, c = _order(a, c)
    b, d = _order(b, d)
    e, g = _order(e, g)
    f, h = _order(f, h)
    a, b = _order(a, b)
    c, d = _order(c, d)
    e, f = _order(e, f)
    g, h = _order(g, h)
    return a, b, c, d, e, f, g, h


@triton.jit
def _order(a, b):
    return tl.maximum(a, b), tl.minimum(a, b)
