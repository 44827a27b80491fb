# SPDX-License-Identifier: Apache-2.0
"""How far float32 may lead from the heads of `rope.py` and from their gradient."""

import torch

from moe_tta.kernels.rope import HeadLayout, Tables, split_heads

# of roundings, half the distance of numbers
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LAYOUTS = {
    "plain": HeadLayout(4, 2, 32),
    "odd": HeadLayout(3, 3, 24),
    "over the width": HeadLayout(3, 3, 24, False, 1e-5),
    "fewer keys over the width": HeadLayout(4, 2, 16, False, 1e-5),
    "head by head": HeadLayout(4, 1, 8, True, 1e-6),
}


def draw_case(layout, dtype, device, rows=(2, 5), positions=1, seed=0):
    """Return joint rows, tables, norms (or None) and gradients of the three parts.

    Angles' tables are any numbers: their halves differ, and no pair lies on a circle.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    tables = Tables(*(draw(positions, rows[1], layout.dim) for _ in range(2)))
    norms = None
    if layout.per_head is not None:
        widths = [layout.dim] * 2 if layout.per_head else layout.widths[:2]
        norms = tuple(draw(width) for width in widths)
    counts = layout.queries, layout.keys, layout.keys
    grads = tuple(draw(*rows, count, layout.dim) for count in counts)
    return draw(*rows, sum(layout.widths)), tables, norms, grads


def exact(joint, tables, norms, grads, layout):
    """Return the law's heads and gradient of the joint rows, in float64 by autograd."""
    leaf = joint.double().requires_grad_()
    wide = tuple(part.double() for part in norms) if norms else None
    heads = split_heads(leaf, Tables(*(t.double() for t in tables)), wide, layout)
    (slope,) = torch.autograd.grad(heads, leaf, [grad.double() for grad in grads])
    return [part.detach() for part in heads], slope


def terms(layout):
    """Numbers under one norm, at most; 0 without."""
    if layout.per_head is None:
        return 0
    return layout.dim if layout.per_head else max(layout.widths)


def _swap(x):
    return torch.cat(x.chunk(2, dim=-1)[::-1], dim=-1)


def head_bounds(joint, tables, norms, layout):
    """Return bounds of the error of queries and keys in float32, unrounded.

    A sum of n squares is off by at most n roundings, so a root of it by n / 2; the
    quotient and the reciprocal root of GPUs by five more, weighing by two; rotation
    adds a product and a sum. All relative to the sum of absolute values.
    """
    bounds = []
    cos, sin = (table.double().abs()[:, :, None] for table in tables)
    for part, weight in _parts(joint, norms, layout):
        size = (part * _scale(part, layout) * weight).abs()
        units = 9 + terms(layout) / 2
        bounds.append(UNIT[torch.float32] * units * (size * cos + _swap(size) * sin))
    return bounds


def gradient_bounds(joint, tables, norms, grads, layout):
    """Return a bound of the error of the joint rows' gradient in float32, unrounded.

    As above: the reciprocal root enters three times, 3 (n / 2 + 5) roundings, and a
    sum of n products once, n; ten more for single products and differences.
    """
    bounds = []
    cos, sin = (table.double().abs()[:, :, None] for table in tables)
    for (part, weight), grad in zip(
        _parts(joint, norms, layout), grads[:2], strict=True
    ):
        size = grad.double().abs()
        size = (size * cos + _swap(size * sin)) * weight.abs()
        if norms:
            scale = _scale(part, layout)
            along = _mean(size * part.abs(), layout)
            size = scale * (size + part.abs() * scale**2 * along)
        units = 25 + 2.5 * terms(layout)
        bounds.append(UNIT[torch.float32] * units * size.flatten(2))
    zeros = torch.zeros_like(grads[2].flatten(2), dtype=torch.float64)
    return torch.cat([*bounds, zeros], dim=2)


def rounded(bound, value, dtype):
    """Add the one rounding of a result to `dtype`, which may fall below its least."""
    if dtype == torch.float32:
        return bound
    return bound + UNIT[dtype] * (value.abs() + bound) + 2.0**-25


def _parts(joint, norms, layout):
    parts = joint.double().split(layout.widths, dim=-1)[:2]
    weights = norms or (torch.ones(layout.dim, device=joint.device),) * 2
    for part, weight in zip(parts, weights, strict=True):
        yield (
            part.unflatten(-1, (-1, layout.dim)),
            weight.double().view(-1, layout.dim),
        )


def _mean(heads, layout):
    dims = (-1,) if layout.per_head else (-2, -1)
    return heads.mean(dim=dims, keepdim=True)


def _scale(heads, layout):
    if layout.per_head is None:
        return torch.ones_like(heads[..., :1])
    return torch.rsqrt(_mean(heads.square(), layout) + layout.eps)
