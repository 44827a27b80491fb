# SPDX-License-Identifier: Apache-2.0
"""One row of the routing kernel by its slot's plan: the law of `reference.py`.

Experts stay in their own order all the way: each lane learns the *rank* of its expert,
and the chosen ones write themselves to column `rank`. Nothing is sorted, and a row
walks no further down the ranks than its plan can reach.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_tta.kernels.route_ranks import (
    INF,
    LOWEST,
    MODEL,
    RANKS,
    SAMPLE,
    TINY,
    UNRANKED,
    count_ranks,
    highest,
    ordered_bits,
    rank_highest,
    redraw,
    uniform,
)
from moe_tta.kernels.scores import EPS
from moe_tta.kernels.table import DEMOTE, DROP, FORBIDDEN, PROMOTE, Layout
from moe_tta.plan import Renorm

_FORBIDDEN, _PROMOTE, _DEMOTE, _DROP = map(
    tl.constexpr, (FORBIDDEN, PROMOTE, DEMOTE, DROP)
)
_RENORM_MODEL, _RENORM_ALWAYS, _ = (tl.constexpr(renorm.value) for renorm in Renorm)
_EPS = tl.constexpr(EPS)
_OFFSETS = Layout.of(1).offsets  # of the numbers and of bias the same for all E
_SEED, _MIX, _SELECT = (tl.constexpr(_OFFSETS[n]) for n in ("seed", "mix", "select"))
_K_MIN, _K_MAX, _RENORM = (
    tl.constexpr(_OFFSETS[n]) for n in ("k_min", "k_max", "renorm")
)
_SELECT_ARGS, _BIAS = (tl.constexpr(_OFFSETS[n]) for n in ("select_args", "bias"))
_MEMORY = tl.constexpr(_OFFSETS["memory"])


@triton.jit
def route_planned_row(
    weights_ptr,  # [WIDTH] f32
    ids_ptr,  # [WIDTH] int32
    logits,  # [BLOCK_E] f32, 0 beyond E
    has_plan,
    position_ptr,
    plan_ptr,  # the slot's bytes, see `table.Layout`
    correction_ptr,  # [E], read with BIASED
    recalled_target_ptr,  # [E] f32, read with RECALLS where the plan names a memory
    recalled_mix_ptr,  # f32, likewise
    layer,
    RECALLS: tl.constexpr,
    E: tl.constexpr,
    LOG_E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    TOP_K: tl.constexpr,
    SCORING: tl.constexpr,
    BIASED: tl.constexpr,
    RENORMALIZES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    FACTOR: tl.constexpr,
    SKIP_UNUSED: tl.constexpr,
):
    """Write all columns of the row."""
    experts = tl.arange(0, BLOCK_E)
    inside = experts < E
    # slot 0 is neutral: its masked loads read nothing; all loads start together
    planned = experts < tl.where(has_plan, E, 0)
    floats = plan_ptr.to(tl.pointer_type(tl.float32))
    ints = plan_ptr.to(tl.pointer_type(tl.int32))
    arrays = floats + _BIAS // 4 + experts  # bias, target, scale, then flags
    flags = tl.load(plan_ptr + _BIAS + 12 * E + experts, mask=planned, other=0)
    flags = flags.to(tl.int32)
    bias = tl.load(arrays, mask=planned, other=0.0)
    scale = tl.load(arrays + 2 * E, mask=planned, other=1.0)
    mix = tl.load(floats + _MIX // 4, mask=has_plan, other=0.0)
    select = tl.load(ints + _SELECT // 4, mask=has_plan, other=MODEL)
    k_min = tl.load(ints + _K_MIN // 4, mask=has_plan, other=TOP_K)
    k_max = tl.load(ints + _K_MAX // 4, mask=has_plan, other=TOP_K)
    renorm = tl.load(ints + _RENORM // 4, mask=has_plan, other=_RENORM_MODEL)
    arg0 = tl.load(floats + _SELECT_ARGS // 4, mask=has_plan, other=0.0)
    arg1 = tl.load(floats + _SELECT_ARGS // 4 + 1, mask=has_plan, other=0.0)
    allowed = inside & ((flags & _FORBIDDEN) == 0)

    # scores and keys
    logits += bias
    if not BIASED:
        logits = _steer(logits, flags, allowed)
    logits = tl.where(allowed, logits, -INF)
    scores = _activate(logits, SCORING)
    keys = logits
    if BIASED:
        correction = tl.load(correction_ptr + experts, mask=inside, other=0.0)
        keys = _steer(scores + correction.to(tl.float32), flags, allowed)
        keys = tl.where(allowed, keys, -INF)
    elif SCORING == "softmax" or SCORING == "topk_softmax":
        target_ptr = arrays + E
        if RECALLS:  # such a plan has no target of its own in this layer
            recalls = tl.load(ints + _MEMORY // 4, mask=has_plan, other=0) > 0
            mix = tl.where(recalls, tl.load(recalled_mix_ptr, mask=recalls), mix)
            target_ptr = tl.where(recalls, recalled_target_ptr + experts, target_ptr)
        has_target = mix > 0
        if has_target:
            target = tl.load(target_ptr, mask=allowed, other=0.0)
            scores = tl.where(allowed, (1 - mix) * scores + mix * target, 0.0)
            keys = tl.where(allowed, scores, -INF)
    if GROUPS > 1:
        keys = _keep_best_groups(keys, flags, experts, E, GROUPS, TOPK_GROUP, BIASED)

    # selection
    shares = scores
    if SCORING == "sigmoid" or SCORING == "sqrtsoftplus":
        shares = scores / tl.maximum(tl.sum(scores, axis=0), TINY)
    eligible = tl.sum((keys != -INF).to(tl.int32), axis=0)
    k_min = tl.where(select == MODEL, TOP_K, k_min)
    k_max = tl.where(select == MODEL, TOP_K, k_max)
    first = tl.where(select == RANKS, arg0.to(tl.int32), 0)
    first = tl.minimum(first, tl.maximum(eligible - 1, 0))
    most = tl.minimum(tl.minimum(k_max, WIDTH), eligible - first)
    depth = first + most
    if select == SAMPLE:
        depth = tl.maximum(depth, tl.minimum(arg1.to(tl.int32) + 1, eligible))
    rank = rank_highest(ordered_bits(keys), experts, first, depth)
    if select == SAMPLE:
        tau = tl.load(floats + _SELECT_ARGS // 4 + 2)
        pool = tl.minimum(arg1, eligible.to(tl.float32))
        seed = tl.load((plan_ptr + _SEED).to(tl.pointer_type(tl.int64)))
        noise = uniform(seed, layer, tl.load(position_ptr), experts)
        rank = redraw(rank, shares, noise, arg0, pool, tau, most)
    count = count_ranks(shares, rank, select, arg0, arg1, k_min, k_max, most, LOG_E)
    count = tl.minimum(tl.maximum(count, k_min), k_max)
    count = tl.minimum(count, most)

    # weights
    used = (rank >= 0) & (rank < count)
    weights = tl.where(used, scores, 0.0)
    weights = tl.where((flags & _DROP) != 0, 0.0, weights * scale)
    shared = renorm == _RENORM_ALWAYS
    if RENORMALIZES:
        shared = shared | (renorm == _RENORM_MODEL)
    if shared:
        total = tl.sum(weights, axis=0)
        weights = tl.where(total > 0, weights / total, 0.0)
    if FACTOR != 1.0:
        weights *= FACTOR
    tl.store(weights_ptr + rank, weights, mask=used)
    tl.store(ids_ptr + rank, experts, mask=used)
    # a row without any eligible expert has no rank 0
    best = tl.min(tl.where(rank == 0, experts, UNRANKED), axis=0)
    fill_unused(
        *(weights_ptr, ids_ptr, count, tl.where(best < E, best, 0)),
        *(WIDTH, BLOCK_W, SKIP_UNUSED),
    )


@triton.jit
def fill_unused(
    weights_ptr,
    ids_ptr,
    count,
    best,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    SKIP_UNUSED: tl.constexpr,
):
    """Give the columns from `count` on weight 0, and expert -1 or the row's best."""
    tail = tl.arange(0, BLOCK_W)
    unused = (tail >= count) & (tail < WIDTH)
    ids = tl.zeros([BLOCK_W], tl.int32)
    if SKIP_UNUSED:
        ids -= 1
    else:
        ids += best
    tl.store(weights_ptr + tail, tl.zeros([BLOCK_W], tl.float32), mask=unused)
    tl.store(ids_ptr + tail, ids, mask=unused)


@triton.jit
def _steer(values, flags, allowed):
    """Move promoted experts above the row's best, demoted ones below its worst."""
    best = highest(tl.where(allowed, values, -INF))
    worst = -highest(tl.where(allowed, -values, -INF))
    values = tl.where((flags & _PROMOTE) != 0, best + _EPS, values)
    return tl.where((flags & _DEMOTE) != 0, worst - _EPS, values)


@triton.jit
def _activate(logits, SCORING: tl.constexpr):
    """Return the scores of float32 logits; the two others go by float64, as the law."""
    if SCORING == "softmax" or SCORING == "topk_softmax":
        powers = tl.exp(logits - highest(logits))
        scores = powers / tl.sum(powers, axis=0)
    else:
        exact = logits.to(tl.float64)
        power = tl.exp(-tl.abs(exact))  # no overflow
        if SCORING == "sigmoid":
            scores = tl.where(exact >= 0, 1.0, power) / (1.0 + power)
        else:
            # log1p(power), exact where 1 + power rounds (Kahan)
            raised = 1.0 + power
            rest = tl.where(raised == 1.0, 1.0, raised - 1.0)
            small = tl.where(raised == 1.0, power, tl.log(raised) * power / rest)
            scores = tl.sqrt(tl.maximum(exact, 0.0) + small)
        scores = scores.to(tl.float32)
    return scores


@triton.jit
def _keep_best_groups(
    keys,
    flags,
    experts,
    E: tl.constexpr,
    GROUPS: tl.constexpr,
    TOPK_GROUP: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Set keys to -inf outside the row's best groups; lanes beyond E are in none."""
    size: tl.constexpr = E // GROUPS
    group = experts // size
    ordered = tl.full(experts.shape, LOWEST, tl.int32)  # lane g speaks for group g
    for index in tl.static_range(GROUPS):
        mine = tl.where(group == index, keys, -INF)
        score = tl.max(mine, axis=0)
        if BIASED and size > 1:
            leader = tl.min(tl.where(mine == score, experts, UNRANKED), axis=0)
            second = tl.max(tl.where(experts == leader, -INF, mine), axis=0)
            score += tl.where(second == -INF, 0.0, second)
        promoted = tl.where(group == index, flags & _PROMOTE, 0)
        score = tl.where(tl.max(promoted, axis=0) > 0, INF, score)
        scores = tl.zeros(experts.shape, tl.float32) + score
        ordered = tl.where(experts == index, ordered_bits(scores), ordered)
    best = rank_highest(ordered, experts, 0, TOPK_GROUP)
    kept = experts < 0
    for index in tl.static_range(GROUPS):
        chosen = tl.min(tl.where(experts == index, best, UNRANKED), axis=0)
        kept = kept | (group == tl.where(chosen < TOPK_GROUP, index, -1))
    return tl.where(kept, keys, -INF)
