# SPDX-License-Identifier: Apache-2.0
"""The law of attention's heads: by hand, and as transformers' modules have it."""

import pytest
import torch

from moe_tta.kernels.rope import HeadLayout, Tables, split_heads
from tests.kernels.rope_bounds import LAYOUTS, UNIT, draw_case, head_bounds

pytest.importorskip("transformers")

from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm, apply_rotary_pos_emb


def theirs(joint, tables, norms, layout):
    """Transformers' norm and rotation: joint rows -> queries, keys, values."""
    parts = list(joint.split(layout.widths, dim=-1))
    if layout.per_head:
        parts = [part.unflatten(-1, (-1, layout.dim)) for part in parts]
    for index, weight in enumerate(norms or ()):
        norm = OlmoeRMSNorm(len(weight), eps=layout.eps)
        norm.weight.data = weight
        parts[index] = norm(parts[index])
    heads = [p.reshape(*joint.shape[:2], -1, layout.dim) for p in parts]
    turned = apply_rotary_pos_emb(*heads[:2], *tables, unsqueeze_dim=2)
    return *turned, heads[2]


@pytest.mark.parametrize("name", LAYOUTS)
def test_equals_transformers(name):
    """Forward and back, each side as far from exact as `rope_bounds` says."""
    layout = LAYOUTS[name]
    joint, tables, norms, grads = draw_case(layout, torch.float32, "cpu")
    sides = []
    for heads_of in (split_heads, theirs):
        leaf = joint.clone().requires_grad_()
        heads = heads_of(leaf, tables, norms, layout)
        sides.append((*heads, *torch.autograd.grad(heads, leaf, grads)))
    for ours, other, bound in zip(
        *(side[:2] for side in sides),
        head_bounds(joint, tables, norms, layout),
        strict=True,
    ):
        assert ((ours - other).abs() <= 2 * bound).all()
    assert torch.equal(sides[0][2], sides[1][2])
    error = (sides[0][3] - sides[1][3]).norm()
    units = 2 * (25 + 2.5 * max(layout.widths))
    assert error <= units * UNIT[torch.float32] * sides[1][3].norm()


def test_by_hand():
    """A head of four numbers: pairs (1, 3) and (2, 4), turned by 90 and 180 degrees."""
    joint = torch.arange(1.0, 13).view(1, 1, 12)
    cos, sin = [0, -1, 0, -1.0], [1, 0, 1, 0.0]
    tables = Tables(torch.tensor([[cos]]), torch.tensor([[sin]]))
    queries, keys, values = split_heads(joint, tables, None, HeadLayout(1, 1, 4))
    assert queries.flatten().tolist() == [-3, -2, 1, -4]
    assert keys.flatten().tolist() == [-7, -6, 5, -8]
    assert values.flatten().tolist() == [9, 10, 11, 12]


def test_norms_by_hand():
    """Two heads of two numbers: the mean square of both is 25, of each 1 and 49."""
    joint = torch.tensor([[[1.0, 1, 7, -7, 1, 1, 7, -7, 0, 0, 0, 0]]])
    still = Tables(torch.ones(1, 1, 2), torch.zeros(1, 1, 2))
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0])
    whole = HeadLayout(2, 2, 2, False, 0.0)
    queries, *_ = split_heads(joint, still, (weight, weight), whole)
    close = torch.testing.assert_close
    close(queries.flatten(), torch.tensor([0.2, 0.4, 4.2, -5.6]), rtol=1e-6, atol=0)
    single = HeadLayout(2, 2, 2, True, 0.0)
    queries, *_ = split_heads(joint, still, (weight[:2], weight[:2]), single)
    close(queries.flatten(), torch.tensor([1.0, 2.0, 1.0, -2.0]), rtol=1e-6, atol=0)


def test_bfloat16_is_rounded_once():
    layout = LAYOUTS["head by head"]
    joint, tables, norms, _ = draw_case(layout, torch.bfloat16, "cpu")
    wide = Tables(*(table.float() for table in tables))
    exact = split_heads(joint.float(), wide, tuple(n.float() for n in norms), layout)
    rough = split_heads(joint, tables, norms, layout)
    for found, want in zip(rough, exact, strict=True):
        assert torch.equal(found, want.bfloat16())
