# SPDX-License-Identifier: Apache-2.0
"""The kernels of attention's heads against the law; `test_triton.py` runs this."""

import pytest
import torch

from moe_tta.adapter.attention import Projection, fused_heads, plain_heads
from moe_tta.kernels.rope import HeadLayout, Tables
from moe_tta.kernels.rope_triton import turn_back, turn_heads
from tests.kernels.rope_bounds import (
    LAYOUTS,
    draw_case,
    exact,
    gradient_bounds,
    head_bounds,
    rounded,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off where hardware rounds
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
LARGE = {
    "olmoe": HeadLayout(16, 16, 128, False, 1e-5),
    "qwen3_moe": HeadLayout(32, 4, 128, True, 1e-6),
    "mixtral": HeadLayout(32, 8, 128),
}
CASES = LAYOUTS | (LARGE if DEVICE == "cuda" else {})


@pytest.mark.parametrize("positions", [1, 2], ids=["shared", "own"])
@pytest.mark.parametrize("dtype", [torch.float32, HALF], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_within_what_float32_may_err(name, dtype, positions):
    layout = CASES[name]
    rows = (2, 5) if name in LAYOUTS else (2, 333)
    joint, tables, norms, grads = draw_case(layout, dtype, DEVICE, rows, positions)
    heads, slope = exact(joint, tables, norms, grads, layout)
    before = joint.clone()
    back = turn_back(grads, before, tables, norms, layout)
    bounds = head_bounds(before, tables, norms, layout)
    turned = turn_heads(joint, tables, norms, layout)
    for found, want, bound in zip(turned, heads[:2], bounds, strict=True):
        assert found.dtype == dtype
        assert ((found - want).abs() <= rounded(bound, want, dtype)).all()
    bound = gradient_bounds(before, tables, norms, grads, layout)
    value_first = layout.widths[0] + layout.widths[1]
    bound[..., :value_first] = rounded(bound, slope, dtype)[..., :value_first]
    assert ((back - slope).abs() <= bound).all()
    # values are left alone; the rest is turned in place where nothing needs it again
    assert torch.equal(joint[..., value_first:], before[..., value_first:])
    assert torch.equal(joint, before) == (norms is not None)
    assert (turned[0].data_ptr() == joint.data_ptr()) == (norms is None)


def test_by_hand():
    """One head of four numbers: pairs (1, 3) and (2, 4), turned by 90 and 180 degrees.

    No norm: (1, 2, 3, 4) becomes (-3, -2, 1, -4), and a gradient turns back.
    """
    layout = HeadLayout(1, 1, 4)
    joint = torch.tensor([[[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12.0]]], device=DEVICE)
    table = Tables(
        torch.tensor([[[0, -1, 0, -1.0]]], device=DEVICE),
        torch.tensor([[[1, 0, 1, 0.0]]], device=DEVICE),
    )
    queries, keys = turn_heads(joint, table, None, layout)
    assert queries.flatten().tolist() == [-3, -2, 1, -4]
    assert keys.flatten().tolist() == [-7, -6, 5, -8]
    assert joint.flatten()[8:].tolist() == [9, 10, 11, 12]
    grads = queries.clone(), keys.clone(), joint[:, :, 8:].view(1, 1, 1, 4).clone()
    back = turn_back(grads, None, table, None, layout)
    assert back.flatten().tolist() == list(range(1, 13))


def test_norms_by_hand():
    """Mean squares 4 and 25 with eps 0: halves and fifths, times the weight."""
    layout = HeadLayout(1, 1, 2, False, 0.0)
    joint = torch.tensor([[[2, -2, 1, 7, 0, 0.0]]], device=DEVICE)
    still = Tables(*(torch.full((1, 1, 2), n, device=DEVICE) for n in (1.0, 0.0)))
    norms = tuple(torch.tensor(w, device=DEVICE) for w in ([1.0, 3.0], [5.0, 10.0]))
    queries, keys = turn_heads(joint, still, norms, layout)
    close = torch.testing.assert_close
    close(queries.flatten().cpu(), torch.tensor([1.0, -3.0]), rtol=2**-21, atol=0)
    close(keys.flatten().cpu(), torch.tensor([1.0, 14.0]), rtol=2**-21, atol=0)
    # a gradient along the norm's input is lost: q's is (1, -1 / 3) weighed to (1, -1)
    ones = torch.tensor([[[[1.0, -1 / 3]]]], device=DEVICE)
    back = turn_back((ones, 0 * ones, ones), joint, still, norms, layout)
    assert float(back[0, 0, :4].abs().max()) <= 2**-20
    assert back[0, 0, 4:].tolist() == ones.flatten().tolist()


@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["odd", "fewer keys over the width", "head by head"])
def test_the_whole_projection(name, biased, maps):
    """Products and heads by kernels equal the plain ones, gradient of hidden too.

    Both make the same products of 20 terms, then err as bounded by their own tests:
    2^-24 times 20 + 25 + 2.5 terms, on each side.
    """
    layout = LAYOUTS[name]
    _, tables, norms, grads = draw_case(layout, torch.float32, DEVICE)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(sum(layout.widths), 20, generator=generator).to(DEVICE)
    bias = torch.randn(len(weight), generator=generator).to(DEVICE)
    sizes = layout.widths if maps == 3 else [len(weight)]
    biases = bias.split(sizes) if biased else [None] * maps
    pairs = tuple(zip(weight.split(sizes), biases, strict=True))
    projection = Projection(pairs, norms, layout)
    hidden = torch.randn(2, 5, 20, generator=generator).to(DEVICE).requires_grad_()
    ours = fused_heads(hidden, projection, tables)
    theirs = plain_heads(hidden, projection, tables)
    assert not any(part.grad_fn is None for part in ours)
    slopes = [torch.autograd.grad(part, hidden, grads) for part in (ours, theirs)]
    bound = 2 * 2**-24 * (45 + 2.5 * layout.widths[0])
    for found, want in zip((*ours, *slopes[0]), (*theirs, *slopes[1]), strict=True):
        assert (found - want).norm() <= bound * want.norm()
    with torch.no_grad():
        again = fused_heads(hidden, projection, tables)
    assert all(torch.equal(a, b) for a, b in zip(again, ours, strict=True))
