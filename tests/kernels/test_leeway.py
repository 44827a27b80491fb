# SPDX-License-Identifier: Apache-2.0
"""The excuse of random plans: it permits the law's choice and hardly another."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.cases import used
from tests.kernels.drawing import LAYERS, ROUTERS
from tests.kernels.leeway import Leeway
from tests.kernels.random_plans import by_law, draw, draw_rows

ROWS = 60


def spoil(rng, ids, num_experts):
    """Yield wrong choices: two ranks swapped, the last left out, a stranger put in."""
    if len(ids) > 1:
        place = rng.integers(len(ids) - 1)
        yield [*ids[:place], ids[place + 1], ids[place], *ids[place + 2 :]]
        yield ids[:-1]
    strangers = sorted({*range(num_experts)} - {*ids})
    if strangers:
        stranger = int(rng.choice(strangers))
        place = rng.integers(len(ids))
        yield [*ids[:place], stranger, *ids[place + 1 :]]


@pytest.mark.parametrize("index", range(len(ROUTERS)))
def test_only_rounding_is_excused(index):
    world = draw(index, 40, "cpu")
    rows = draw_rows(world, ROWS)
    experts, width = world.shape.num_experts, world.shape.k_max
    law = by_law(world, rows)
    permitted = asked = 0
    for row in range(ROWS):
        leeway = Leeway(
            *(rows.logits[row, :experts].float(), int(rows.slots[row])),
            *(int(rows.positions[row]), world.table, world.rule, width, LAYERS[1]),
        )
        ids, _ = used(law.topk_weights[row], law.topk_ids[row])
        assert leeway.permits(ids)
        for wrong in spoil(np.random.default_rng(row), ids, experts):
            permitted += leeway.permits(wrong)
            asked += 1
    assert asked > ROWS
    assert permitted <= 0.02 * asked


def test_ties_are_not_excused():
    """Equal biased scores from equal inputs: only the lowest id may come first."""
    world = draw(5, 1, "cpu")
    world.rule.correction_bias.zero_()
    leeway = Leeway(
        torch.zeros(256), 0, 0, world.table, world.rule, world.shape.k_max, LAYERS[1]
    )
    top_k = world.shape.top_k
    assert leeway.key_errors.any()
    groups_first = list(range(top_k))
    assert leeway.permits(groups_first)
    assert not leeway.permits([1, 0, *groups_first[2:]])
    assert not leeway.permits([*groups_first[:-1], top_k])
