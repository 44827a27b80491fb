# SPDX-License-Identifier: Apache-2.0
"""Options of the Triton kernel; `test_triton.py` runs this in a process.

Rows by vLLM's own rule, skipped columns, padding, given rows, rows taken together.
"""

import numpy as np
import pytest
import torch

from moe_tta.kernels.reference import Routing, RoutingRule
from moe_tta.kernels.route import ModelRows, RoutingKernel
from moe_tta.kernels.table import LayerTable
from moe_tta.plan import Select
from tests.kernels.cases import make_plan, make_shape, make_table
from tests.kernels.drawing import grid
from tests.kernels.triton_cases import DEVICE, NAN_ROWS, poison

__all__ = ["poison"]


def launch(logits, slots, table, rule, width, *, padding=None, given=None, **options):
    """Run the kernel with its options and return its routing on CPU."""
    table = LayerTable(*(tensor.to(DEVICE) for tensor in table))
    kernel = RoutingKernel(table, rule, width, 0, **options)
    positions = torch.zeros(len(logits), dtype=torch.int64, device=DEVICE)
    if padding is not None:
        padding = padding.to(DEVICE)
    if given is not None:
        given = Routing(*(tensor.to(DEVICE) for tensor in given))
    rows = logits.to(DEVICE), slots.to(DEVICE), positions
    return Routing(*(tensor.cpu() for tensor in kernel(*rows, padding, given)))


def test_stock_rows_without_numbers_are_the_first_experts():
    """vLLM's kernel counts what is no number as 0, and ties go to the lowest id."""
    shape = make_shape(num_experts=8, top_k=3, k_max=4)
    rule, slots = RoutingRule.from_shape(shape), torch.zeros(3, dtype=torch.int32)
    result = launch(NAN_ROWS, slots, make_table(shape).layer(0), rule, 4)
    assert result.topk_ids.tolist() == [[0, 1, 2, 0]] * 3
    assert (result.topk_weights == 0).all()


@pytest.mark.parametrize("num_experts", [4, 8, 60, 64, 128, 192, 300, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_sum_visits_every_expert_once(num_experts, dtype):
    """Equal logits give exactly 1 / E, whatever the order of the sum."""
    shape = make_shape(num_experts=num_experts, top_k=2, renormalize=False)
    logits = torch.full((2, num_experts), 3.0, dtype=dtype)
    rule, slots = RoutingRule.from_shape(shape), torch.zeros(2, dtype=torch.int32)
    result = launch(logits, slots, make_table(shape).layer(0), rule, 2)
    share = torch.tensor(1.0) / num_experts
    assert result.topk_ids.tolist() == [[0, 1]] * 2
    assert torch.equal(result.topk_weights, share.expand(2, 2))


@pytest.mark.parametrize("num_experts", [8, 60, 64, 128])
@pytest.mark.parametrize("skip", [False, True])
def test_rows_taken_together_are_rows_alone(monkeypatch, num_experts, skip):
    """Tiles of the model's rows, tiles with a plan or padding in them, a short tile."""
    shape = make_shape(num_experts=num_experts, top_k=3, k_max=5)
    table = make_table(shape, make_plan(bias=np.arange(num_experts))).layer(0)
    rng = np.random.default_rng(num_experts)
    num_rows = 5 * (256 // num_experts) // 2 + 1
    # only rows of 16 bits are taken together; these numbers are exact in them
    logits = torch.from_numpy(grid(rng, (num_rows, num_experts + 2), 4)).half()
    slots = torch.zeros(num_rows, dtype=torch.int32)
    padding = torch.zeros(num_rows, dtype=torch.bool)
    slots[num_rows // 2], padding[-1] = 1, True
    args = logits, slots, table, RoutingRule.from_shape(shape), 5
    alone = launch(*args, padding=padding, skip_unused=skip)
    monkeypatch.setattr("moe_tta.kernels.route.MANY_ROWS", 1)
    together = launch(*args, padding=padding, skip_unused=skip)
    assert torch.equal(together.topk_ids, alone.topk_ids)
    assert torch.equal(together.topk_weights, alone.topk_weights)


def _close_logits(kind: str, num_rows: int, num_experts: int) -> torch.Tensor:
    """Logits that rank differently as numbers and as rounded softmax, or nearly so."""
    rng = torch.Generator().manual_seed(num_experts)
    normal = torch.randn(num_rows, num_experts, generator=rng)
    tiny, zeros = normal * 2.0**-14, torch.where(normal > 0, 0.0, -0.0)
    made = {
        "normal": normal,
        "all tiny": tiny,
        "tiny at the edge": torch.where(torch.arange(num_experts) < 2, 8.0, tiny),
        "zeros of both signs": zeros,
        "zeros at the edge": torch.where(torch.arange(num_experts) < 2, 8.0, zeros),
        "ties": (normal * 2).round() / 2,
        "far below": torch.where(torch.arange(num_experts) == 5, 9.0, normal - 100),
        "minus infinity": normal.masked_fill(normal < 0.9, -torch.inf),
        "infinity": normal.masked_fill(normal > 2, torch.inf),
        "nan": normal.masked_fill(normal > 2, torch.nan),
    }
    return made[kind]


@pytest.mark.parametrize(
    ("num_experts", "top_k", "renormalize"),
    [(8, 3, False), (60, 3, True), (64, 8, True), (128, 7, False)],
)
@pytest.mark.parametrize(
    "kind",
    [
        *("normal", "all tiny", "tiny at the edge", "zeros of both signs", "ties"),
        *("zeros at the edge", "far below", "minus infinity", "infinity", "nan"),
    ],
)
def test_ranks_by_keys_are_ranks_by_softmax(
    monkeypatch, kind, renormalize, top_k, num_experts
):
    shape = make_shape(num_experts=num_experts, top_k=top_k, renormalize=renormalize)
    rule, table = RoutingRule.from_shape(shape), make_table(shape).layer(0)
    num_rows = 3 * max(4, 256 // num_experts) + 1
    logits = _close_logits(kind, num_rows, num_experts).to(torch.float16)
    args = logits, torch.zeros(num_rows, dtype=torch.int32), table, rule, top_k
    alone = launch(*args)
    monkeypatch.setattr("moe_tta.kernels.route.MANY_ROWS", 1)
    for many in (num_rows + 1, num_rows):  # four lanes a row, then two
        monkeypatch.setattr("moe_tta.kernels.route.MANY_WITH_PLANS", many)
        together = launch(*args)
        assert torch.equal(together.topk_ids, alone.topk_ids)
        assert torch.equal(together.topk_weights, alone.topk_weights)


def test_unused_columns_can_be_skipped():
    shape = make_shape(num_experts=8, top_k=3, k_max=4)
    plan = make_plan(select=Select.TOP_K, k_min=1, k_max=1)
    logits = torch.arange(8.0).flip(0).expand(2, 8)
    rows = logits, torch.tensor([0, 1], dtype=torch.int32)
    table, rule = make_table(shape, plan).layer(0), RoutingRule.from_shape(shape)
    repeated = launch(*rows, table, rule, 4)
    skipped = launch(*rows, table, rule, 4, skip_unused=True)
    assert repeated.topk_ids.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert skipped.topk_ids.tolist() == [[0, 1, 2, -1], [0, -1, -1, -1]]
    assert torch.equal(repeated.topk_weights, skipped.topk_weights)
    assert (skipped.topk_weights[1, 1:] == 0).all()


@pytest.mark.parametrize("rows", list(ModelRows))
def test_padding_routes_nowhere(rows):
    shape = make_shape(num_experts=8, top_k=2, k_max=3)
    rule, slots = RoutingRule.from_shape(shape), torch.zeros(3, dtype=torch.int32)
    padding = torch.tensor([False, True, False])
    given = Routing(torch.rand(3, 2), torch.tensor([[5, 1], [6, 2], [7, 3]]))
    result = launch(
        *(torch.randn(3, 8), slots, make_table(shape).layer(0), rule, 3),
        padding=padding,
        given=given if rows is ModelRows.GIVEN else None,
        model_rows=rows,
    )
    assert result.topk_ids[1].tolist() == [-1, -1, -1]
    assert (result.topk_ids[padding.logical_not()] >= 0).all()


def test_given_rows_are_copied():
    shape = make_shape(num_experts=8, top_k=2, k_max=3, scoring="sigmoid")
    plan = make_plan(bias=np.zeros(8))
    table, rule = make_table(shape, plan).layer(0), RoutingRule.from_shape(shape)
    given = Routing(torch.rand(2, 2), torch.tensor([[5, 1], [6, 2]]))
    logits, slots = torch.arange(16.0).view(2, 8), torch.tensor([0, 1]).int()
    result = launch(
        logits, slots, table, rule, 3, given=given, model_rows=ModelRows.GIVEN
    )
    assert torch.equal(result.topk_weights[0, :2], given.topk_weights[0])
    assert result.topk_ids.tolist() == [[5, 1, 5], [7, 6, 7]]


def test_routers_without_stock_rows_are_refused():
    shape = make_shape(num_experts=8, scoring="sigmoid")
    with pytest.raises(ValueError, match="no stock kernel"):
        RoutingKernel(
            *(make_table(shape).layer(0), RoutingRule.from_shape(shape), 2, 0),
            model_rows=ModelRows.STOCK,
        )
