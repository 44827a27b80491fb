# SPDX-License-Identifier: Apache-2.0
"""What the adapter's kernels must equal, at any size: plain torch and float64.

`u` is the unit roundoff of a dtype, U that of float32, in which kernels compute.
"""

import torch

from moe_tta.kernels.grouped import grouped_experts
from moe_tta.kernels.pairs import PLAIN, spread_rows
from tests.kernels.cases import U
from tests.kernels.expert_bounds import bounds

MANY = 2**16  # numbers whose norm says something


def draw_ids(num_rows, num_experts, width, seed=0, empty=True):
    """Return different experts [T, K] of each row; the second expert gets none."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(num_rows, num_experts, generator=generator)
    if empty and width < num_experts:
        scores[:, 1] = -1
    return scores.topk(width, dim=1).indices


def draw(*shape, seed=1, dtype=torch.float32, device="cpu"):
    """Draw normal numbers."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def check_order(work, ids, num_experts, device):
    """Places are those of a stable sort."""
    found = work.order_pairs(ids.to(device), num_experts)
    wanted = PLAIN.order_pairs(ids, num_experts)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours.cpu(), theirs)


def check_sums(work, ids, num_experts, hidden, dtype, device):
    """Sums are those of plain torch, bit for bit."""
    order = PLAIN.order_pairs(ids.to(device), num_experts)
    pairs = draw(ids.numel(), hidden, seed=2, dtype=dtype).to(device)
    weights = draw(*ids.shape, seed=3).to(device)
    for factors in (None, weights):
        ours = work.sum_pairs(pairs, order, factors)
        assert torch.equal(ours, PLAIN.sum_pairs(pairs, order, factors))


def check_products(work, ids, inner, outer, dtype, device):
    """Within a bound of exact arithmetic, entry by entry, of rows and of places.

    Each of `inner` products is rounded as it is added, in float32; the sum to `dtype`.
    """
    u, num_experts = torch.finfo(dtype).eps / 2, int(ids.max()) + 1
    order = PLAIN.order_pairs(ids.to(device), num_experts)
    weight = draw(num_experts, inner, outer, seed=4, dtype=dtype, device=device)
    experts = ids.to(device).reshape(-1)[order.pairs.long()]
    rows = draw(len(ids), inner, dtype=dtype).to(device)
    spread = spread_rows(rows, order)
    wanted = _by_expert(spread.double(), weight.double(), experts)
    sizes = _by_expert(spread.double().abs(), weight.double().abs(), experts)
    bound = inner * U * sizes + u * wanted.abs()
    for matrices in (weight, weight.mT.contiguous().mT):
        from_rows = work.multiply(rows, matrices, order, from_rows=True)
        assert from_rows.dtype == dtype
        assert_within(from_rows, wanted, bound)
        assert torch.equal(work.multiply(spread, matrices, order), from_rows)


def _by_expert(spread, weight, experts):
    product = spread.new_empty(len(spread), weight.shape[2])
    for expert, matrix in enumerate(weight):
        product[experts == expert] = spread[experts == expert] @ matrix
    return product


def check_activation(work, ids, num_experts, inner, dtype, device):
    """Within a bound of exact arithmetic, entry by entry.

    An exponential of x is wrong by 2 |x| U + 2 U: its argument is scaled to base 2
    and rounded, and the hardware's is good to two last places. Some ten roundings
    follow, and one to `dtype`.
    """
    u = torch.finfo(dtype).eps / 2
    gate_up = (3 * draw(ids.numel(), 2 * inner, dtype=dtype)).to(device)
    slope = draw(ids.numel(), inner, seed=2, dtype=dtype).to(device)
    weights = draw(*ids.shape, seed=3).to(device)
    order = PLAIN.order_pairs(ids.to(device), num_experts)
    exact, rough = gate_up.double(), (4 * gate_up.double().abs() + 24) * U
    gate, up = exact.chunk(2, dim=1)
    rough = rough[:, :inner]

    product = work.silu_and_mul(gate_up)
    wanted = PLAIN.silu_and_mul(exact)
    assert product.dtype == dtype
    assert_within(product, wanted, wanted.abs() * (rough + u))

    found = work.silu_and_mul_backward(gate_up, slope, weights, order)
    wanted = PLAIN.silu_and_mul_backward(exact, slope.double(), weights, order)
    summands = (PLAIN.silu_and_mul(exact) * slope.double()).abs()
    # a product may be rounded to the other side; then I terms are added in float32
    bound = (summands * (rough + 2 * u + inner * U)).sum(dim=1)
    bound = bound[order.places.reshape(-1).long()].view(ids.shape)
    assert_within(found[0], wanted[0], bound)
    scale = weights.reshape(-1)[order.pairs.long(), None].double() * slope.double()
    # 1 + gate (1 - share) may cancel: the bound is that of its terms
    size = (scale * torch.sigmoid(gate)).abs()
    bounds = size * up.abs() * (1 + gate.abs()), size * gate.abs()
    bound = torch.cat([part * rough for part in bounds], dim=1)
    assert_within(found[1], wanted[1], bound + u * wanted[1].abs())
    alone, none = work.silu_and_mul_backward(gate_up, slope, weights, order, False)
    assert none is None
    assert torch.equal(alone, found[0])


def assert_within(found, wanted, bound):
    """Compare entry by entry; subnormals of 16-bit floats round by their spacing."""
    tiny = torch.finfo(found.dtype).tiny * torch.finfo(found.dtype).eps
    missed = (found.double() - wanted.double()).abs() - bound
    assert missed.max() <= tiny, f"by {float(missed.max())} at {int(missed.argmax())}"


def loop(hidden, ids, weights, gate_up_proj, down_proj):
    """The same layer, one expert after the other, summed in float32 or wider."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros_like(hidden, dtype=wide)
    for expert, (first, second) in enumerate(zip(gate_up_proj, down_proj, strict=True)):
        rows, columns = (ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[rows] @ first.T).chunk(2, dim=1)
        y = (torch.nn.functional.silu(gate) * up) @ second.T
        y = y.to(wide) * weights[rows, columns, None].to(wide)
        total = total.index_add(0, rows, y)
    return total.to(hidden.dtype)


def with_gradients(function, hidden, ids, weights, *matrices):
    """Return the output and gradients of rows and weights, for one gradient of it."""
    hidden, weights = hidden.detach().requires_grad_(), weights.detach()
    weights.requires_grad_()
    output = function(hidden, ids, weights, *matrices)
    slope = draw(*output.shape, seed=9).to(output)
    return output.detach(), *torch.autograd.grad(output, (hidden, weights), slope)


def draw_layer(num_rows, hidden, inner, num_experts, width, dtype, device, empty=True):
    """Return arguments of `loop` whose outputs are about 1."""
    ids = draw_ids(num_rows, num_experts, width, empty=empty)
    weights = torch.softmax(draw(num_rows, width, seed=5), dim=1)
    first = draw(num_experts, 2 * inner, hidden, seed=6, device=device) / hidden**0.5
    second = draw(num_experts, hidden, inner, seed=7, device=device) / inner**0.5
    rows = draw(num_rows, hidden, seed=8)
    rows, first, second = (part.to(device, dtype) for part in (rows, first, second))
    return rows, ids.to(device), weights.to(device), first, second


def check_layer(work, *size, dtype, device):
    """Output and gradients are within their bounds of float64, entry by entry.

    Where there are many, output and rows' gradient are besides as near as a loop in
    norm, to a factor of two; one rounding is added, of a loop's and of ours.
    """
    layer = draw_layer(*size, dtype, device)

    def ours(*args):
        return grouped_experts(*args, work)

    exact = with_gradients(loop, *(_double(part) for part in layer))
    rough = with_gradients(loop, *layer)
    found = with_gradients(ours, *layer)
    slope = draw(*found[0].shape, seed=9).to(layer[0])
    for value, true, bound in zip(found, exact, bounds(*layer, slope), strict=True):
        assert_within(value, true, bound)
    assert [value.dtype for value in found] == [dtype, dtype, torch.float32]
    for value, near, true in zip(found[:2], rough[:2], exact[:2], strict=True):
        error, allowed = (value - true).norm(), (near - true).norm()
        rounding = torch.finfo(dtype).eps / 2 * true.norm()
        few = value.numel() < MANY
        assert few or error <= 2 * allowed + rounding, f"{error} {allowed} {rounding}"
    again = with_gradients(ours, *layer)
    assert all(map(torch.equal, found, again))


def _double(part):
    return part.double() if part.is_floating_point() else part
