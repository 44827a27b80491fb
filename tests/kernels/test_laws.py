# SPDX-License-Identifier: Apache-2.0
"""Route() against the loop oracle and under changes that must not matter."""

import dataclasses

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_tta.kernels.noise import uniform
from moe_tta.kernels.reference import Routing, RoutingRule, model_routing, route
from moe_tta.kernels.table import Features
from moe_tta.plan import RoutingPlan, Select
from tests.kernels.cases import U, features_of, make_plan, make_shape, make_table, used
from tests.kernels.drawing import LAYERS, NUM_ROWS, ROUTERS, worlds
from tests.kernels.oracle import Row, noise

# logits reach 6, so exponents differ by less than 16 after rounding and 32 with a
# plan; exp, sums over 12 experts, division, blending and scaling add fewer than 32
# roundings of the result
RTOL = 64 * U
UNGROUPED = tuple(r for r in ROUTERS if r[2] == 1)


def run(world, rows=slice(None), features=Features.ALL, layer=1):
    return route(
        world.logits[rows],
        world.slots[rows],
        world.positions[rows],
        world.table.layer(layer),
        world.rule,
        world.shape.k_max,
        LAYERS[layer],
        features,
    )


def equal(one: Routing, other: Routing):
    return torch.equal(one.topk_ids, other.topk_ids) and torch.equal(
        one.topk_weights, other.topk_weights
    )


@given(worlds(), st.integers(0, 1))
def test_equals_the_loop_oracle(world, layer):
    weights, ids = run(world, layer=layer)
    for row in range(NUM_ROWS):
        want = Row(
            world.logits[row],
            world.plans[world.slots[row]],
            layer,
            world.rule,
            world.shape.k_max,
            LAYERS[layer],
            int(world.positions[row]),
        )
        if want.unsure:
            continue
        got_ids, got_weights = used(weights[row], ids[row])
        assert got_ids == want.ids
        np.testing.assert_allclose(got_weights, want.weights, rtol=RTOL, atol=0)


def test_oracle_is_rarely_unsure():
    unsure = []

    @settings(max_examples=50)
    @given(worlds())
    def look(world):
        for row in range(NUM_ROWS):
            plan = world.plans[world.slots[row]]
            width, position = world.shape.k_max, int(world.positions[row])
            args = (world.logits[row], plan, 0, world.rule, width, 3, position)
            unsure.append(Row(*args).unsure)

    look()
    assert sum(unsure) < 0.05 * len(unsure)


@given(worlds())
def test_neutral_rows_follow_the_model(world):
    own = model_routing(world.logits, world.rule, world.shape.k_max)
    rows = world.slots == 0
    got = run(world)
    assert equal(Routing(*(x[rows] for x in got)), Routing(*(x[rows] for x in own)))


@given(worlds())
def test_row_alone_equals_row_in_batch(world):
    together = run(world)
    for row in range(NUM_ROWS):
        rows = slice(row, row + 1)
        assert equal(run(world, rows), Routing(*(x[rows] for x in together)))


@given(worlds(), st.randoms(use_true_random=False))
def test_permuting_tokens_permutes_rows(world, random):
    order = random.sample(range(NUM_ROWS), NUM_ROWS)
    assert equal(run(world, order), Routing(*(x[order] for x in run(world))))


@given(worlds())
def test_skipping_unused_features_changes_nothing(world):
    needed = features_of(world.table, world.slots)
    assert equal(run(world, features=needed), run(world))


@given(worlds(routers=UNGROUPED, ties=False), st.integers(0, 2**32 - 1))
def test_permuting_experts_commutes(world, seed):
    order = np.random.default_rng(seed).permutation(world.shape.num_experts)
    plans = [without_draws_and_ties(plan) for plan in world.plans[1:]]
    bias = world.rule.correction_bias
    moved = dataclasses.replace(
        world,
        logits=world.logits[:, order],
        table=make_table(world.shape, *(permuted(plan, order) for plan in plans)),
        rule=dataclasses.replace(
            world.rule, correction_bias=None if bias is None else bias[order]
        ),
    )
    world = dataclasses.replace(world, table=make_table(world.shape, *plans))
    rows = [row for row in range(NUM_ROWS) if not near_tie(world, plans, row)]
    weights, ids = run(world, rows)
    moved_weights, moved_ids = run(moved, rows)
    assert torch.equal(torch.from_numpy(order)[moved_ids.long()], ids.long())
    # the sum over experts runs in another order
    torch.testing.assert_close(moved_weights, weights, rtol=2 * 12 * U, atol=0)


def without_draws_and_ties(plan):
    """Drop what legitimately depends on expert ids: draws, and equal promotions."""
    fields = dict.fromkeys(("promote", "demote", "bias"))
    if plan.select is not None:
        fields["select"] = np.where(plan.select == Select.SAMPLE, 0, plan.select)
    return dataclasses.replace(plan, **fields)


def near_tie(world, plans, row):
    """Whether the row's outcome hangs on the rounding of computed scores."""
    plan = [RoutingPlan(), *plans][world.slots[row]]
    width = world.shape.k_max
    return Row(world.logits[row], plan, 1, world.rule, width, 7, 0).unsure


def permuted(plan, order):
    return RoutingPlan(
        **{
            name: value[:, order] if name in PER_EXPERT else value
            for name, value in plan.arrays().items()
        }
    )


PER_EXPERT = ("allow", "target", "scale", "drop")


@given(
    st.sampled_from(UNGROUPED),
    st.integers(0, 7),
    st.floats(0, 8, width=32),
    st.integers(0, 2**32 - 1),
)
def test_larger_bias_never_lowers_a_rank(router, expert, boost, seed):
    scoring, biased, *_ = router
    shape = make_shape(8, k_max=8, scoring=scoring, has_correction_bias=biased)
    every_rank = {"select": Select.TOP_K, "k_max": 8, "select_args": np.zeros(3)}
    raised = np.zeros(8, np.float32)
    raised[expert] = boost
    table = make_table(
        shape, make_plan(**every_rank), make_plan(**every_rank, bias=raised)
    )
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(NUM_ROWS, 8, generator=rng)
    bias = torch.randn(8, generator=rng) if biased else None
    rule = RoutingRule.from_shape(shape, bias)
    ranks = []
    for slot in (1, 2):
        slots = torch.full((NUM_ROWS,), slot)
        result = route(logits, slots, slots, table.layer(0), rule, 8, 0)
        ranks.append((result.topk_ids == expert).int().argmax(dim=1))
    assert (ranks[1] <= ranks[0]).all()


def test_compiles_to_one_graph():
    """No value reaches the host: a tensor-dependent branch would break the graph."""
    shape = make_shape(8, top_k=2, k_max=4)
    plan = make_plan(
        select=Select.SAMPLE, k_max=4, select_args=[2, 8, 1], promote=np.eye(8)[1]
    )
    table = make_table(shape, plan)
    rule = RoutingRule.from_shape(shape)
    logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    slots, positions = torch.tensor([0, 1] * 3), torch.arange(6)
    args = (logits, slots, positions, table.layer(0), rule, 4, 0)
    compiled = torch.compile(route, fullgraph=True, backend="eager")
    assert equal(compiled(*args), route(*args))
    table.write({1: make_plan(allow=np.arange(8) < 4)})
    assert equal(compiled(*args), route(*args))


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 200), st.integers(0, 2**31 - 1))
def test_noise_equals_plain_integers(seed, layer, position):
    got = uniform(torch.tensor([seed]), layer, torch.tensor([position]), 5)
    assert got.tolist() == [[noise(seed, layer, position, e) for e in range(5)]]
    assert ((got > 0) & (got < 1)).all()


def test_noise_is_uniform_and_uncorrelated():
    got = uniform(torch.zeros(4096, dtype=torch.int64), 0, torch.arange(4096), 16)
    # 65536 samples; standard errors of a mean of uniforms and of a correlation
    assert abs(got.mean() - 0.5) < 5 * (1 / 12 / got.numel()) ** 0.5
    correlation = torch.corrcoef(got.T) - torch.eye(16)
    assert correlation.abs().max() < 5 / 4096**0.5


def test_noise_is_pinned():
    got = uniform(torch.tensor([0, 1, -1]), 5, torch.tensor([0, 7, 123456]), 3)
    bits = (got.double() * 2**24).long()
    assert bits.tolist() == [
        [4605747, 10107911, 11883017],
        [14035811, 16358451, 9688111],
        [6121355, 734863, 14726661],
    ]
