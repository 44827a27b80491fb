# SPDX-License-Identifier: Apache-2.0
"""Many random plans in one table: `draw` a world and rows, `check` the kernel's word.

Each entry of `WORLDS` is one compilation of the kernel, so plans and rows are many
and worlds are few.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from moe_tta.kernels.reference import Routing, RoutingRule, route
from moe_tta.kernels.route import RoutingKernel
from moe_tta.kernels.table import LayerTable, PlanTable
from moe_tta.shape import RouterShape
from tests.kernels.cases import used
from tests.kernels.drawing import (
    LAYERS,
    ROUTERS,
    grid,
    make_any_plan,
    make_any_shape,
)
from tests.kernels.leeway import Leeway, weight_error

EXPERTS = (8, 64, 128, 4, 60, 256, 16, 512, 72, 160)
TOP_KS = (2, 8, 1, 6, 4, 10, 32, 3, 16)
GUARD = 16  # rows before and behind an output; keeps it aligned to 16 bytes
POISON = {torch.float32: float("nan"), torch.int32: -7}


class Layout(NamedTuple):
    """How logits and slots lie in memory."""

    logits: torch.dtype
    extra: int  # columns behind the experts
    apart: int  # rows between two rows, plus one
    transposed: bool
    slots: torch.dtype


LAYOUTS = (
    Layout(torch.bfloat16, 0, 1, False, torch.int32),
    Layout(torch.float32, 0, 1, False, torch.int32),
    Layout(torch.bfloat16, 5, 3, False, torch.int64),
    Layout(torch.float32, 3, 2, True, torch.int32),
)
# scoring, experts and k change with different periods: 33 worlds hold every router
# three times, every number of experts and every k
WORLDS = range(33)


@dataclass
class World:
    rng: np.random.Generator
    shape: RouterShape
    rule: RoutingRule
    table: LayerTable
    kernel: RoutingKernel
    layout: Layout
    num_plans: int
    padded: bool  # some rows are no token


class Rows(NamedTuple):
    logits: torch.Tensor  # [T, >= E]
    slots: torch.Tensor  # [T]
    positions: torch.Tensor  # [T] int64
    padding: torch.Tensor | None  # [T] bool


def draw(index, num_plans, device, most_experts=512):
    """Return world `index` of `WORLDS` with random plans in slots 1..num_plans."""
    rng = np.random.default_rng(index)
    router = ROUTERS[index % len(ROUTERS)]
    _, biased, groups, topk_group, _ = router
    num_experts = min(EXPERTS[index % len(EXPERTS)], most_experts)
    reachable = num_experts // groups * topk_group
    top_k = min(TOP_KS[index % len(TOP_KS)], reachable)
    shape = make_any_shape(rng, router, num_experts, top_k)
    table = PlanTable(shape, num_plans, device)
    slots = range(1, num_plans + 1)
    table.write({slot: make_any_plan(rng, shape) for slot in slots})
    bias = torch.from_numpy(grid(rng, num_experts, 1)).to(device) if biased else None
    rule = RoutingRule.from_shape(shape, bias)
    kernel = RoutingKernel(
        *(table.layer(1), rule, shape.k_max, LAYERS[1]), skip_unused=index % 2 == 1
    )
    layout = LAYOUTS[index % len(LAYOUTS)]
    return World(
        rng, shape, rule, table.layer(1), kernel, layout, num_plans, index % 3 == 0
    )


def draw_rows(world, num_rows):
    """Return rows whose slots go through all plans; one row in eight has none."""
    rng, layout = world.rng, world.layout
    size = (num_rows * layout.apart, world.shape.num_experts + layout.extra)
    logits = rng.normal(0, 3, size).astype(np.float32)
    tied = rng.random(size[0]) < 0.5
    logits[tied] = grid(rng, (int(tied.sum()), size[1]), 4)
    device = world.table.bias.device
    logits = torch.from_numpy(logits).to(device, layout.logits)
    if layout.transposed:
        logits = logits.T.contiguous().T
    slots = (rng.permutation(max(num_rows, 1))[:num_rows] % world.num_plans) + 1
    slots[rng.random(num_rows) < 1 / 8] = 0
    padding = torch.from_numpy(rng.random(num_rows) < 1 / 8).to(device)
    return Rows(
        logits[:: layout.apart],
        torch.from_numpy(slots).to(device, layout.slots),
        torch.from_numpy(rng.integers(0, 2**40, num_rows)).to(device),
        padding if world.padded else None,
    )


def check(world, rows):
    """Route by the kernel and by the law; return the number of excused rows.

    Ids differ only where `Leeway` permits what the kernel chose; all other rows agree
    in weights up to `weight_error`.
    """
    law = by_law(world, rows)
    with guarded() as blocks:
        result = world.kernel(*rows)
    check_memory(result, blocks)
    assert result.topk_ids.shape == law.topk_ids.shape
    if not len(rows.slots):
        return 0
    result = plain(world, rows, result, law)
    experts = world.shape.num_experts
    assert ((result.topk_ids >= 0) & (result.topk_ids < experts)).all()
    differ = (result.topk_ids != law.topk_ids).any(dim=1)
    bias = world.table.bias[rows.slots.long()]
    logits = rows.logits[:, :experts].float()
    reach = logits.abs().amax(dim=1) + bias.abs().amax(dim=1) + 1
    bound = weight_error(reach, experts, world.shape.k_max)[:, None]
    gap = (result.topk_weights - law.topk_weights).abs()
    wrong = ~differ & (gap > bound * law.topk_weights.abs()).any(dim=1)
    assert not wrong.any(), describe(world, rows, law, result, wrong)
    excused = differ.nonzero().flatten().tolist()
    refused = [index for index in excused if not permitted(world, rows, result, index)]
    assert not refused, describe(world, rows, law, result, refused[:1])
    return len(excused)


def by_law(world, rows):
    rest = world.table, world.rule, world.shape.k_max, LAYERS[1]
    return route(rows.logits, rows.slots, rows.positions, *rest)


def plain(world, rows, result, law):
    """Check ids -1; return the result with the law's padding rows and unused ids."""
    weights, ids = result
    if rows.padding is not None:
        assert (ids[rows.padding] == -1).all()
        assert (weights[rows.padding] == 0).all()
        place = rows.padding[:, None]
        weights = torch.where(place, law.topk_weights, weights)
        ids = torch.where(place, law.topk_ids, ids)
    if world.kernel.skip_unused:
        repeated = ids[:, 1:] == ids[:, :1]
        if rows.padding is not None:
            repeated &= ~place
        assert not repeated.any()
        ids = torch.where(ids == -1, ids[:, :1], ids)
    return Routing(weights, ids)


def permitted(world, rows, result, index):
    row = Leeway(
        rows.logits[index, : world.shape.num_experts].float().cpu(),
        int(rows.slots[index]),
        int(rows.positions[index]),
        LayerTable(*(field.cpu() for field in world.table)),
        on_cpu(world.rule),
        world.shape.k_max,
        LAYERS[1],
    )
    ids, _ = used(result.topk_weights[index], result.topk_ids[index])
    return row.permits(ids)


def on_cpu(rule):
    bias = rule.correction_bias
    return RoutingRule(
        **{**vars(rule), "correction_bias": None if bias is None else bias.cpu()}
    )


def describe(world, rows, law, result, where):
    """Say what the first wrong row should have been."""
    index = where[0] if isinstance(where, list) else int(where.nonzero()[0, 0])
    slot = int(rows.slots[index])
    small = {
        name: getattr(world.table, name)[slot].tolist()
        for name in ("mix", "select", "k_min", "k_max", "select_args", "renorm")
    }
    return (
        f"{world.shape} {world.layout} row {index} slot {slot} {small}: "
        f"law {[part[index].tolist() for part in law]}, "
        f"kernel {[part[index].tolist() for part in result]}"
    )


@contextmanager
def guarded():
    """Let `torch.empty` return poisoned tensors between poisoned rows; yield these."""
    blocks, empty = [], torch.empty

    def poisoned(*size, dtype=torch.float32, **more):
        if len(size) == 1 and not isinstance(size[0], int):
            size = tuple(size[0])
        if len(size) != 2 or dtype not in POISON:
            return empty(size, dtype=dtype, **more)
        block = empty((size[0] + 2 * GUARD, size[1]), dtype=dtype, **more)
        block.fill_(POISON[dtype])
        blocks.append(block)
        return block[GUARD : GUARD + size[0]]

    torch.empty = poisoned
    try:
        yield blocks
    finally:
        torch.empty = empty


def check_memory(result, blocks):
    """Both outputs lie in guarded blocks, are all written, and nothing beyond them."""
    stored = {block.untyped_storage().data_ptr(): block for block in blocks}
    for name, output in result._asdict().items():
        block = stored[output.untyped_storage().data_ptr()]
        lost = block.isnan() if block.is_floating_point() else block == -7
        assert not lost[GUARD:-GUARD].any(), f"{name} has places not written"
        assert lost[:GUARD].all(), f"written before {name}"
        assert lost[-GUARD:].all(), f"written behind {name}"
