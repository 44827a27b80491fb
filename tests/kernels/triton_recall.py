# SPDX-License-Identifier: Apache-2.0
"""The kernels of recall against the law; `test_triton.py` runs this."""

import math

import pytest
import torch

from moe_tta.kernels import recall_triton
from moe_tta.kernels.packed_memory import StoredTokens, pack
from moe_tta.kernels.recall import LayerMemory, Recalled, recall_rows
from moe_tta.kernels.recall_triton import RecallKernel, RecallWorkspace
from moe_tta.kernels.reference import RoutingRule, route
from moe_tta.kernels.route import ModelRows, RoutingKernel
from moe_tta.kernels.table import LayerTable, PlanTable
from moe_tta.plan import MAX_RECALLED
from tests.kernels.cases import U, make_plan, make_shape
from tests.kernels.leeway import weight_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
POISON = 7e30
E = 6
SHAPE = make_shape(num_experts=E, top_k=2, k_max=4)
# the interpreter cuts bfloat16 off where hardware rounds: only what is exact in it
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def stored(keys, values=None):
    """Keys of about length 1 in float32, as a store holds them, on the CPU."""
    keys = torch.as_tensor(keys, dtype=torch.float64)
    keys = (keys / keys.norm(dim=1, keepdim=True)).float()
    if values is None:
        values = torch.eye(E)[torch.arange(len(keys)) % E]
    return StoredTokens(keys, torch.as_tensor(values, dtype=torch.float32))


def drawn(generator, tokens, width):
    values = torch.rand(tokens, E, generator=generator)
    values[values < 0.5] = 0
    keys = torch.randn(tokens, width, generator=generator) + 0.3
    return stored(keys, values / values.sum(dim=1, keepdim=True).clamp_min(1))


def law(part):
    if part is None:
        return None
    keys = part.keys.double()
    return LayerMemory(keys / keys.norm(dim=1, keepdim=True), part.values)


def planned(places_and_counts):
    table = PlanTable(SHAPE, len(places_and_counts), "cpu")
    table.write(
        {
            slot: make_plan(memory=place, neighbours=count) if place else make_plan()
            for slot, (place, count) in enumerate(places_and_counts, start=1)
        }
    )
    return table


def on_device(table):
    return LayerTable(*(tensor.to(DEVICE) for tensor in table))


def asking_rows(slots, table, extra=()):
    rows = torch.nonzero(table.memory[slots.long()] > 0).flatten().tolist()
    asking = torch.full((1 + len(slots) + len(extra),), 10**6, dtype=torch.int32)
    rows = torch.tensor([*rows, *extra], dtype=torch.int32)
    asking[0], asking[1 : 1 + len(rows)] = len(rows), rows
    return asking


def check(hidden, slots, table, parts, lists=None):
    """Equal to the law, bit for bit, where a row asks; nothing written elsewhere."""
    layer = table.layer(0)
    space = RecallWorkspace(len(slots) + 3, E, DEVICE)
    if lists is not None:
        space.lists = space.lists[:lists]
    for tensor in (space.target, space.mix):
        tensor.fill_(POISON)
    space.lists.fill_(2**61)  # nearer than anything, were it read
    kernel = RecallKernel(on_device(layer), pack(parts, DEVICE), space)
    asking = asking_rows(slots, layer)
    given = hidden.to(DEVICE), slots.to(DEVICE), asking.to(DEVICE)
    for _ in range(2):  # compiled, and then from the cache
        found = Recalled(*(tensor.cpu() for tensor in kernel(*given)))
    want = recall_rows(hidden, slots, layer, [law(part) for part in parts])
    asks = layer.memory[slots.long()] > 0
    assert torch.equal(found.mix[asks], want.mix[asks])
    assert torch.equal(found.target[asks], want.target[asks])
    assert (found.mix[~asks] == POISON).all()
    assert (found.target[~asks] == POISON).all()
    assert (space.mix[len(slots) :] == POISON).all()
    return found


# tokens of each memory, numbers a key, rows
WORLDS = [
    ((1,), 8, 3),
    ((63,), 100, 20),
    ((65, None, 7), 64, 33),
    ((200, 130), 130, 5),
]


@pytest.mark.parametrize("seed", range(len(WORLDS)))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_equal_the_law(seed, dtype):
    sizes, width, rows = WORLDS[seed]
    generator = torch.Generator().manual_seed(seed)
    parts = [None if n is None else drawn(generator, n, width) for n in sizes]
    plans = [(0, 0)]
    for place, tokens in enumerate(sizes, start=1):
        most = min(MAX_RECALLED, tokens or 5)
        plans += [(place, count) for count in {1, most, min(8, most)}]
    table = planned(plans)
    hidden = torch.randn(rows, width, generator=generator) * 0.5 + 0.3
    hidden = (hidden * 64).round() / 64  # exact in 16 bits
    slots = torch.randint(0, len(plans) + 1, (rows,), generator=generator).int()
    check(hidden.to(dtype), slots, table, parts)


@pytest.mark.parametrize("lists", [16, 32, 48])
def test_parts_are_as_many_as_there_is_room_for(lists):
    """One list a row, two, and three for a tile: the same result."""
    generator = torch.Generator().manual_seed(9)
    hidden = torch.randn(16, 40, generator=generator)
    slots = torch.ones(16, dtype=torch.int32)
    check(hidden, slots, planned([(1, 8)]), [drawn(generator, 300, 40)], lists)


def test_by_hand():
    """Cosines 0.75, 0.5 and -1; and a row of zeros, one without numbers, far rows."""
    keys = [[0.75, math.sqrt(7) / 4], [0.5, math.sqrt(3) / 2], [-1.0, 0.0]]
    rows = [[3, 0], [3, 0], [0, 0], [math.nan, 1], [math.inf, 1], [1e-30, 0], [-1, -1]]
    slots = torch.tensor([1, 2, 1, 1, 1, 1, 3], dtype=torch.int32)
    table = planned([(1, 2), (1, 3), (1, 1)])
    found = check(torch.tensor(rows), slots, table, [stored(keys)])
    mixes = [0.625, 0.25 / 3, 0, 0, 0, 0.625, math.sqrt(0.5)]
    assert found.mix.tolist() == pytest.approx(mixes, abs=2**-16)
    assert found.target[0].tolist() == pytest.approx([0.6, 0.4, 0, 0, 0, 0])
    assert found.target[2:5].tolist() == [[0.0] * E] * 3


def test_of_equal_cosines_the_lowest_places_come_first():
    keys = [[0.5, math.sqrt(3) / 2]] + [[0.75, math.sqrt(7) / 4]] * 130
    values = torch.zeros(131, E)
    values[1:3, 0] = 1  # the two lowest places of those that are nearest
    values[3:, 1] = 1
    slots = torch.tensor([1, 2], dtype=torch.int32)
    table = planned([(1, 2), (1, 64)])
    hidden = torch.tensor([[3.0, 0]] * 2)
    found = check(hidden, slots, table, [stored(keys, values)])
    assert found.target[0].tolist() == [1.0] + [0.0] * 5
    assert found.target[1].tolist() == [2 / 64, 62 / 64, 0, 0, 0, 0]


def test_rows_that_are_not_there_are_left_alone():
    """A step of fewer rows than the last one that was staged."""
    table = planned([(1, 1)])
    layer, part = table.layer(0), stored([[1.0, 0.0]])
    space = RecallWorkspace(4, E, DEVICE)
    space.mix.fill_(POISON)
    kernel = RecallKernel(on_device(layer), pack([part], DEVICE), space)
    slots = torch.tensor([0, 1, 1, 1], dtype=torch.int32)
    asking = asking_rows(slots, layer).to(DEVICE)
    kernel(torch.ones(2, 2, device=DEVICE), slots.to(DEVICE), asking)
    assert space.mix.tolist()[0] == space.mix.tolist()[2] == pytest.approx(POISON)
    assert space.mix[1].item() == pytest.approx(math.sqrt(0.5), abs=2**-16)


def test_no_row_asks():
    table = planned([(1, 1)])
    slots = torch.zeros(3, dtype=torch.int32)
    check(torch.ones(3, 2), slots, table, [stored([[1.0, 0.0]])])


def test_the_workspace_is_bounded():
    space = RecallWorkspace(8192, 64, "cpu")
    assert space.nbytes == 65536 * MAX_RECALLED * 8 + 8192 * 65 * 4
    assert recall_triton.LISTS * MAX_RECALLED * 8 == 32 << 20


@pytest.mark.parametrize("model_rows", [ModelRows.LAW, ModelRows.STOCK])
def test_rows_are_routed_by_what_they_recall(model_rows):
    """As by the law; and rows whose plan names no memory keep their bits."""
    generator = torch.Generator().manual_seed(3)
    table = PlanTable(SHAPE, 3, "cpu")
    table.write(
        {
            1: make_plan(memory=1, neighbours=3),
            2: make_plan(memory=1, neighbours=5, allow=torch.arange(E).numpy() != 2),
            3: make_plan(target=[0, 0, 0, 0.5, 0.5, 0], mix=0.75),
        }
    )
    layer, rule = table.layer(0), RoutingRule.from_shape(SHAPE)
    parts = [drawn(generator, 50, 16)]
    rows = 24
    hidden = torch.randn(rows, 16, generator=generator)
    logits = torch.randn(rows, E, generator=generator)
    slots = torch.arange(rows, dtype=torch.int32) % 4
    where = on_device(layer)
    space = RecallWorkspace(rows, E, DEVICE)
    recall = RecallKernel(where, pack(parts, DEVICE), space)
    space.mix.fill_(POISON)
    given = logits.to(DEVICE), slots.to(DEVICE), torch.zeros(rows).long().to(DEVICE)
    asking = asking_rows(slots, layer).to(DEVICE)
    recalled = recall(hidden.to(DEVICE), given[1], asking)
    kernel = RoutingKernel(where, rule, 4, 0, model_rows=model_rows)
    got = [part.cpu() for part in kernel(*given, recalled=recalled)]
    without = [part.cpu() for part in kernel(*given)]
    found = recall_rows(hidden, slots, layer, [law(parts[0])])
    want = route(*(logits, slots, slots.long(), layer, rule, 4, 0), recalled=found)
    assert torch.equal(got[1], want.topk_ids)
    # blended weights: the router's part is as far off as elsewhere, the other is not
    reach = logits.abs().amax(dim=1, keepdim=True) + 1
    error = weight_error(reach, E, 4) + 4 * U
    assert ((got[0] - want.topk_weights).abs() <= error).all()
    others = (slots == 0) | (slots == 3)
    assert torch.equal(got[0][others], without[0][others])
    assert (got[0][~others] != without[0][~others]).any(dim=1).sum() > 6


def test_the_benchmark_times_nothing_that_differs_from_the_law():
    from benchmarks.remix import recall_gpu

    sizes = ["--hidden-size", "24", "--experts", "5", "--k", "3", "--device", DEVICE]
    args = recall_gpu.parser().parse_args(sizes)
    table, first = recall_gpu.one_plan(args), recall_gpu.stored(70, args)
    every, nobody = (recall_gpu.step(4, asking, args) for asking in (True, False))
    assert (every.asking.tolist(), every.slots.tolist()) == ([4, 0, 1, 2, 3], [1] * 4)
    assert (nobody.asking[0].item(), nobody.slots.tolist()) == (0, [0] * 4)
    space = RecallWorkspace(4, 5, DEVICE)
    kernel = RecallKernel(table, pack([first], DEVICE), space)
    wide = first.keys.double()
    right = LayerMemory(wide / wide.norm(dim=1, keepdim=True), first.values)
    for given in (every, nobody):
        recall_gpu.check(kernel, given, table, right)
    with pytest.raises(SystemExit, match="kernels and law differ"):
        recall_gpu.check(kernel, every, table, right._replace(keys=-right.keys))
