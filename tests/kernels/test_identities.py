# SPDX-License-Identifier: Apache-2.0
"""The identities that the papers' formulas must satisfy, one test each."""

import math

import numpy as np
import pytest
import torch

from moe_tta.diagnostics import (
    gaussian_kernel,
    kernel_regression,
    npmi,
    risk_difference,
    segment_routing_f1,
)
from moe_tta.kernels.contrast import IMPLAUSIBLE, contrast_logits
from moe_tta.kernels.reference import RoutingRule, model_routing, route
from moe_tta.plan import FIELDS, Renorm, RoutingPlan, Select
from tests.kernels.cases import (
    LOGITS,
    U,
    experts,
    make_plan,
    make_shape,
    make_table,
    routed,
)

E, ROWS = 16, 64
# weights carry a softmax and a sum over 16 experts, a division: under 32 roundings
RTOL = 32 * U


@pytest.fixture
def logits():
    """Multiples of 1/64, so that adding a bias on the same grid is exact."""
    rng = torch.Generator().manual_seed(0)
    return torch.randint(-256, 257, (ROWS, E), generator=rng) / 64


def softmax(logits):
    return torch.softmax(logits.double(), dim=1).numpy()


SCORINGS = [
    {"scoring": "softmax"},
    {"scoring": "softmax", "renormalize": False},
    {"scoring": "topk_softmax"},
    {"scoring": "sigmoid", "has_correction_bias": True, "routed_scaling_factor": 2.5},
    {"scoring": "sqrtsoftplus", "has_correction_bias": True},
    {"scoring": "softmax", "num_expert_group": 4, "topk_group": 2},
]


@pytest.mark.parametrize("fields", SCORINGS)
def test_1_identity(logits, fields):
    shape = make_shape(E, top_k=4, k_max=8, **fields)
    bias = torch.linspace(-1, 1, E) if shape.has_correction_bias else None
    rule = RoutingRule.from_shape(shape, bias)
    spelled_out = RoutingPlan(
        **{
            name: np.full((1, E) if per_expert else (1,), neutral, dtype)
            for name, (dtype, per_expert, neutral) in FIELDS.items()
            if name != "select_args"
        },
        select_args=np.zeros((1, 3), np.float32),
    )
    table = make_table(shape, RoutingPlan(), spelled_out)
    own = model_routing(logits, rule, 8)
    for slot in (0, 1, 2):
        slots = torch.full((ROWS,), slot)
        got = route(logits, slots, slots, table.layer(0), rule, 8, 0)
        assert torch.equal(got.topk_ids, own.topk_ids)
        assert torch.equal(got.topk_weights, own.topk_weights)


def test_2_promote_and_demote(logits):
    shape = make_shape(E, top_k=4, k_max=4, renormalize=False)
    demoted, promoted = set(range(4, 16)), {9, 3}
    for ids, _ in routed(logits, shape, make_plan(demote=experts(E, *demoted))):
        assert not demoted & set(ids)  # E - |A-| = k, so no room for one
    for ids, _ in routed(logits, shape, make_plan(promote=experts(E, *promoted))):
        assert promoted <= set(ids)
    plan = make_plan(promote=experts(E, 9), demote=experts(E, 0))
    p = softmax(logits)
    for row, (ids, weights) in enumerate(routed(logits, shape, plan)):
        untouched = [(i, w) for i, w in zip(ids, weights, strict=True) if i != 9]
        ratios = [w / p[row, i] for i, w in untouched]
        np.testing.assert_allclose(ratios, ratios[0], rtol=2 * RTOL)


def test_3_additive_delta(logits):
    shape = make_shape(E, top_k=4, k_max=4, renormalize=False)
    delta = (np.arange(E) % 5 - 2) / 64
    shifted = routed(logits, shape, make_plan(bias=delta))
    p = softmax(logits + torch.from_numpy(delta))
    for row, (ids, weights) in enumerate(shifted):
        np.testing.assert_allclose(weights, p[row, ids], rtol=RTOL)
    assert routed(logits, shape, make_plan(bias=delta + 2.0)) == shifted


@pytest.mark.parametrize("renormalize", [True, False])
def test_4_override(logits, renormalize):
    shape = make_shape(E, top_k=4, k_max=4, renormalize=renormalize)
    w = np.arange(1, E + 1) / 136  # sums to 1
    plan = make_plan(target=w, mix=1)
    total = w[-4:].sum() if renormalize else 1.0
    for ids, weights in routed(logits, shape, plan):
        assert ids == [15, 14, 13, 12]
        np.testing.assert_allclose(weights, w[ids] / total, rtol=RTOL)


def test_5_kernel_regression():
    rng = np.random.default_rng(0)
    pathways = rng.dirichlet(np.ones(E), (3, 2))  # 3 neighbours, 2 layers
    kernel = np.array([0.2, 0.5, 0.1])
    mean = kernel_regression(kernel, pathways)
    np.testing.assert_allclose(mean.sum(axis=1), 1.0, rtol=1e-14)
    assert (mean >= 0).all()
    np.testing.assert_array_equal(kernel_regression([0.3], pathways[:1]), pathways[0])
    near, query = rng.standard_normal((2, 8))
    near, query = near / np.linalg.norm(near), query / np.linalg.norm(query)
    want = math.exp(-(2 - 2 * near @ query) / (2 * 0.5**2))
    np.testing.assert_allclose(gaussian_kernel(query, [near], 0.5), [want], rtol=1e-12)


@pytest.mark.parametrize(
    ("mass", "count"), [(0.0, 1), (0.3, 1), (0.5, 2), (0.85, 3), (0.95, 4), (2.0, 4)]
)
def test_6_top_p(mass, count):
    plan = make_plan(select=Select.TOP_P, k_max=4, select_args=[mass, 0, 0])
    ((ids, _),) = routed(LOGITS, make_shape(), plan)
    assert ids == list(range(count))


@pytest.mark.parametrize(("beta", "count"), [(0.70, 2), (0.80, 1)])
def test_7_naee(beta, count):
    plan = make_plan(select=Select.RELATIVE, k_max=2, select_args=[beta, 0, 0])
    ((ids, _),) = routed(LOGITS, make_shape(k_max=2), plan)  # w1 / w0 = 0.75
    assert ids == [0, 1][:count]


@pytest.mark.parametrize(
    ("tau", "alpha", "count"), [(0.25, 1.0, 2), (0.25, 2.0, 3), (0.9, 1.0, 1)]
)
def test_8_modes(tau, alpha, count):
    args = [tau / alpha, 0, 0]
    plan = make_plan(select=Select.ABSOLUTE, k_max=4, select_args=args)
    ((ids, _),) = routed(LOGITS, make_shape(), plan)
    assert ids == [0, 1, 2, 3][:count]  # rank 0 stays even when alpha * p < tau


def test_9_entropy_k():
    # a uniform row (Hn = 1), a one-hot row (0) and two equal experts of four (1/2)
    rows = torch.tensor([[0.0, 0, 0, 0], [200.0, 0, 0, 0], [200.0, 200, 0, 0]])
    plan = make_plan(select=Select.ENTROPY, k_min=1, k_max=3, select_args=[0, 1, 0])
    counts = [len(ids) for ids, _ in routed(rows, make_shape(), plan)]
    assert counts == [3, 1, 2]


def test_10_expert_sample(logits):
    shape = make_shape(E, top_k=4, k_max=4)
    keep = 4 // 2 + 1

    def sample(tau, seed=1, rows=logits, **at):
        args = [keep, 16, tau]
        plan = make_plan(select=Select.SAMPLE, k_max=4, select_args=args, seed=seed)
        return routed(rows, shape, plan, **at)

    drawn, plain = sample(1.0), routed(logits, shape, RoutingPlan())
    for (ids, weights), (top, _) in zip(drawn, plain, strict=True):
        assert len(set(ids)) == 4
        assert ids[:keep] == top[:keep]
        assert abs(sum(weights) - 1) <= 4 * 4 * U
    assert sample(1.0) == drawn != plain
    positions = torch.arange(ROWS)
    last = sample(1.0, rows=logits[-1:], positions=positions[-1:])
    assert last == drawn[-1:]
    assert sample(1.0, seed=2) != drawn
    assert sample(1.0, layer=1) != drawn
    assert sample(1.0, positions=positions + 1) != drawn
    assert sample(1e-6) == plain


def test_11_self_contrast():
    rng = torch.Generator().manual_seed(0)
    strong, weak = torch.randn(2, 5, 50, generator=rng)
    best = strong.argmax(dim=1)
    for beta in (0.0, 0.5, 2.0):
        assert torch.equal(contrast_logits(strong, strong, beta, 0.1).argmax(1), best)
        out = contrast_logits(strong, weak, beta, 0.1)
        plausible = strong >= strong.amax(1)[:, None] - 2.302585
        assert plausible.any(dim=1).all()
        assert torch.equal(out[~plausible], strong[~plausible] - IMPLAUSIBLE)
        # out of reach: even the best of the others has no probability left
        assert (out[plausible].min() - out[~plausible].max()) > IMPLAUSIBLE / 2
    assert torch.equal(contrast_logits(strong, weak, 0.0, 0.1).argmax(1), best)


def test_12_npmi():
    assert npmi(5, 5, 5, 100) == pytest.approx(1.0)
    assert npmi(10, 20, 50, 100) == pytest.approx(0.0)  # 10/100 = 20/100 * 50/100


@pytest.mark.parametrize("beta", [1.0, 0.5, 64.0])
def test_13_rice_multiplier(logits, beta):
    shape = make_shape(E, top_k=4, k_max=4, renormalize=False)
    scale = np.where(np.arange(E) < 8, beta, 1.0)
    plain = routed(logits, shape, RoutingPlan())
    scaled = routed(logits, shape, make_plan(scale=scale))
    for (ids, weights), (own_ids, own) in zip(scaled, plain, strict=True):
        assert ids == own_ids
        assert weights == [w * scale[i] for i, w in zip(ids, own, strict=True)]
    assert (scaled == plain) == (beta == 1.0)


def test_14_mote_drop(logits):
    shape = make_shape(E, top_k=4, k_max=4)
    plain = routed(logits, shape, RoutingPlan())
    dropped = routed(logits, shape, make_plan(drop=experts(E, *range(0, E, 2))))
    hits = 0
    for (ids, weights), (own_ids, own) in zip(dropped, plain, strict=True):
        assert ids == own_ids
        even = [i % 2 == 0 for i in ids]
        assert [w for w, e in zip(weights, even, strict=True) if e] == [0.0] * sum(even)
        hits += any(even)
        if not all(even):
            assert abs(sum(weights) - sum(own)) <= 2 * 4 * 4 * U
    assert hits > ROWS / 2


def test_14_mote_drop_keeps_raw_weights_when_never_renormalised(logits):
    shape = make_shape(E, top_k=4, k_max=4)
    plan = make_plan(drop=experts(E, 0), renorm=Renorm.NEVER)
    p = softmax(logits)
    for row, (ids, weights) in enumerate(routed(logits, shape, plan)):
        want = [0.0 if i == 0 else p[row, i] for i in ids]
        np.testing.assert_allclose(weights, want, rtol=RTOL)


def test_15_srp():
    active = np.repeat(np.arange(16) % 2 == 0, 8)  # 16 windows of 8 tokens
    assert segment_routing_f1(active, window=8, stride=8) == (1.0, 1.0)


def test_16_detection_flips_sign():
    rng = np.random.default_rng(0)
    shown, absent = rng.integers(0, 100, (2, 4, E))
    d = risk_difference(shown, 100, absent, 150)
    np.testing.assert_array_equal(risk_difference(absent, 150, shown, 100), -d)
    assert d[0, 0] == shown[0, 0] / 100 - absent[0, 0] / 150
