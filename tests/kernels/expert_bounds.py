# SPDX-License-Identifier: Apache-2.0
"""How far a layer of experts may be from exact arithmetic, entry by entry.

Products are summed in float32, one rounding U for each term, and activations take some;
what is stored is rounded to the layer's dtype, by u.
"""

from typing import NamedTuple

import torch
from torch.nn import functional

from tests.kernels.cases import U


class Near(NamedTuple):
    """Exact values, and how far off they may be."""

    value: torch.Tensor
    off: torch.Tensor

    @property
    def size(self):
        """Largest absolute values."""
        return self.value.abs() + self.off


def product(a, matrix, u):
    """Multiply [N, in] by an exact [in, out] and round to the dtype of u."""
    matrix, value = matrix.double(), a.value @ matrix.double()
    sizes = a.size @ matrix.abs()
    off = a.off @ matrix.abs() + len(matrix) * U * sizes
    return Near(value, off + u * (value.abs() + off))


def activations(gate_up, slope, weight, u):
    """Return silu(gate) up, and the gradient of gate and up for w <slope, that>.

    |silu'| is at most 1.1 and |silu''| at most 0.5. Roundings within an exponential
    count for its argument, and the terms of 1 + gate (1 - share) may cancel.
    """
    (gate, up), (gate_off, up_off) = (part.chunk(2, dim=1) for part in gate_up)
    gate, up = Near(gate, gate_off), Near(up, up_off)
    share, rough = torch.sigmoid(gate.value), (4 * gate.size + 24) * U
    silu = functional.silu(gate.value)
    silu = Near(silu, 1.1 * gate.off + rough * (silu.abs() + 1.1 * gate.off))
    steep = share * (1 + gate.value * (1 - share))
    steep = Near(steep, 0.5 * gate.off + rough * (1 + gate.size))
    flow = Near(weight * slope.value, weight.abs() * slope.off)
    grads = _times(_times(steep, up), flow), _times(silu, flow)
    grad = Near(*(torch.cat(parts, dim=1) for parts in zip(*grads, strict=True)))
    return _rounded(_times(silu, up), u), _rounded(grad, u)


def _times(a, b):
    value = a.value * b.value
    return Near(value, a.size * b.size - value.abs())


def _rounded(a, u):
    return Near(a.value, a.off + u * a.size)


def bounds(hidden, ids, weights, first, second, slope):
    """Return bounds of the output [T, H], and of rows' and weights' gradients.

    Args:
        hidden: [T, H], as the rest, `loop`'s.
        ids: [T, K].
        weights: [T, K].
        first: [E, 2 I, H].
        second: [E, H, I].
        slope: [T, H], the output's gradient.
    """
    u = torch.finfo(hidden.dtype).eps / 2
    num_terms = ids.shape[1]
    output, rows_grad = (torch.zeros_like(hidden, dtype=torch.float64) for _ in "ab")
    sums = output.clone(), rows_grad.clone()
    chosen = torch.zeros(ids.shape, dtype=torch.float64, device=ids.device)
    for expert, (w1, w2) in enumerate(zip(first, second, strict=True)):
        rows, columns = (ids == expert).nonzero(as_tuple=True)
        x, g = (
            Near(p[rows].double(), torch.zeros_like(p[rows]).double())
            for p in (hidden, slope)
        )
        weight = weights[rows, columns, None].double()
        flow = product(g, w2, u)
        h, grad = activations(product(x, w1.T, u), flow, weight, u)
        y, back = product(h, w2.T, u), product(grad, w1, u)
        output[rows] += weight.abs() * y.off
        rows_grad[rows] += back.off
        for total, part in zip(sums, (weight.abs() * y.size, back.size), strict=True):
            total[rows] += part
        exact = h.size * flow.size
        off = exact - (h.value * flow.value).abs() + len(w2.T) * U * exact
        chosen[rows, columns] = off.sum(dim=1)
    output, rows_grad = (
        off + (2 * num_terms * U + u) * total
        for off, total in zip((output, rows_grad), sums, strict=True)
    )
    return output, rows_grad, chosen
