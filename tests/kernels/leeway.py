# SPDX-License-Identifier: Apache-2.0
"""Which choices of one row float32 rounding permits: an excuse must be derived.

U = 2^-24, and `reach` bounds |logit + bias| + EPS of a row. For one side, kernel or
law: z = logit + bias errs by reach U; d = z - max z (|d| <= 2 reach) by another 2
reach U for the other z and 2 reach U for its own rounding, less than 4 reach U in all
where the two z agree in sign and 6 otherwise. exp(d) turns that into a relative
error, and adds 4 reach U (times a rounded log2 e) and 4 U (2 ulp). The sum of E such
terms errs by as much and by E U, the division by 4 U, a blend with a target by 4 U.
Together (20 reach + E + 16) U; the other scorings err less.
"""

from dataclasses import replace
from itertools import combinations

import numpy as np
import torch

from moe_tta.kernels.noise import uniform
from moe_tta.kernels.scores import score_experts
from moe_tta.kernels.table import DEMOTE, PROMOTE, Features
from moe_tta.plan import Select
from tests.kernels.cases import U

TINY = float(np.finfo(np.float32).tiny)


def score_error(reach, num_experts):
    """Return the relative error of one side's scores."""
    return (20 * reach + num_experts + 16) * U


def weight_error(reach, num_experts, width):
    """Return the relative difference of two sides' weights.

    The score's error, that of a sum of `width` scores, and their own roundings: scale,
    sum, division (2 ulp) and factor.
    """
    return 2 * (2 * score_error(reach, num_experts) + (width + 8) * U)


class Leeway:
    """One row's numbers by the law in float32, and their errors against the kernel's.

    Every error here is of a difference of two sides, so it counts both.
    """

    def __init__(self, logits, slot, position, table, rule, width, layer):
        slots = torch.tensor([slot])
        self.rule, self.width, self.layer, self.position = rule, width, layer, position
        self.seed = table.seed[slots]
        self.flags = table.flags[slot].numpy()
        self.plan = {
            name: getattr(table, name)[slot].item()
            for name in ("select", "k_min", "k_max")
        }
        self.args = table.select_args[slot].tolist()
        biases = table.bias[slots]
        scores, keys = score_experts(
            *(logits[None].float(), table.flags[slots], slots, table),
            replace(rule, num_expert_group=1, topk_group=1),
            Features.ALL,
        )
        self.scores = scores[0].double().numpy()
        self.keys = keys[0].double().numpy()
        self.inputs = [(logits + biases[0]).numpy(), table.target[slot].numpy()]
        if rule.correction_bias is not None:
            self.inputs.append(rule.correction_bias.numpy())
        reach = float(logits.abs().max() + biases.abs().max()) + 1
        self.relative = 2 * score_error(reach, len(logits))
        self.set_key_errors(slot, table.mix[slot].item())
        total = 1.0 if rule.softmax else max(self.scores.sum(), TINY)
        self.shares = self.scores / total
        # the score's error, the sum's, and the division's: below three times the first
        self.share_errors = 3 * self.relative * self.shares

    def set_key_errors(self, slot, mix):
        """Logits rank exactly alike on both sides; computed scores do not.

        Slot 0 may rank by softmax scores, as vLLM's own kernel does.
        """
        rule, finite = self.rule, np.isfinite(self.keys)
        computed = rule.correction_bias is not None or (rule.softmax and mix > 0)
        if slot == 0 and rule.softmax and not computed and rule.num_expert_group == 1:
            self.keys = np.where(finite, self.scores, -np.inf)
        elif not computed:
            self.key_errors = np.zeros_like(self.keys)
            return
        sizes = np.where(finite, np.abs(self.keys), 0)
        # a steered key carries the error of the row's best or worst
        errors = self.relative * self.scores
        steered = self.flags & (PROMOTE | DEMOTE) > 0
        errors = np.where(steered, errors[finite].max(), errors)
        self.key_errors = errors + 4 * U * sizes

    def permits(self, ids):
        """Return whether the used experts `ids` (a list) are a choice within errors."""
        if len(set(ids)) != len(ids):
            return False
        return any(self.fits(ids, eligible) for eligible in self.eligible_sets())

    def eligible_sets(self):
        """Yield the masks [E] of eligible experts that the choice of groups permits."""
        finite = np.isfinite(self.keys)
        count = self.rule.num_expert_group
        if count == 1:
            yield finite
            return
        group = np.arange(len(finite)) // (len(finite) // count)
        scores, errors = self.score_groups(group, finite)
        for kept in combinations(range(count), self.rule.topk_group):
            outside = [g for g in range(count) if g not in kept]
            if all(
                scores[a] + errors[a] > scores[b] - errors[b]
                or (scores[a] == scores[b] and a < b)
                for a in kept
                for b in outside
            ):
                yield finite & np.isin(group, kept)

    def score_groups(self, group, finite):
        scores, errors = [], []
        for index in range(self.rule.num_expert_group):
            mine = finite & (group == index)
            best = np.sort(self.keys[mine])[::-1]
            one = self.rule.correction_bias is None
            scores.append(best[: 1 if one else 2].sum() if mine.any() else -np.inf)
            errors.append(2 * self.key_errors[mine].max() if mine.any() else 0.0)
            if (self.flags[group == index] & PROMOTE).any():
                scores[-1] = np.inf
        return scores, errors

    def rank_bounds(self, eligible):
        """Return the lowest and the highest rank [E] that each expert may have."""
        low, high = self.keys - self.key_errors, self.keys + self.key_errors
        ids = np.arange(len(low))
        same = np.logical_and.reduce([x[:, None] == x for x in self.inputs])
        for bit in (PROMOTE, DEMOTE):
            same |= (self.flags[:, None] & self.flags & bit) > 0
        # computed from the same numbers: equal on each side, so the lowest id is first
        twins = same & (self.keys[:, None] == self.keys)
        if not self.key_errors.any():
            twins = self.keys[:, None] == self.keys
        ahead = ids[:, None] < ids
        surely = (low[:, None] > high) | (twins & ahead)
        maybe = (high[:, None] >= low) & ~(twins & ~ahead)
        surely, maybe = surely & eligible[:, None], maybe & eligible[:, None]
        return surely.sum(axis=0), maybe.sum(axis=0)

    def fits(self, ids, eligible):
        num_eligible = int(eligible.sum())
        if not eligible[ids].all():
            return False
        lowest, highest = self.rank_bounds(eligible)
        first, keep = 0, len(ids)
        if self.plan["select"] == Select.RANKS:
            first = min(int(self.args[0]), num_eligible - 1)
        if self.plan["select"] == Select.SAMPLE:
            keep = min(int(self.args[0]), keep)
        for rank, expert in enumerate(ids[:keep], start=first):
            if not lowest[expert] <= rank <= highest[expert]:
                return False
        if not self.drawn_fit(ids, keep, eligible, lowest, highest):
            return False
        rest = eligible.copy()
        rest[ids] = False
        following = np.flatnonzero(rest & (lowest <= len(ids)) & (len(ids) <= highest))
        few, many = self.count_bounds(ids, following)
        most = min(num_eligible - first, self.width)
        return min(few, most) <= len(ids) <= min(many, most)

    def drawn_fit(self, ids, keep, eligible, lowest, highest):
        """Return whether the experts behind `keep` are the best of the drawn ones."""
        if keep == len(ids):
            return True
        pool, tau = min(int(self.args[1]), int(eligible.sum())), self.args[2]
        noise = uniform(
            self.seed, self.layer, torch.tensor([self.position]), len(self.keys)
        )
        gumbel = -np.log(-np.log(noise[0].double().numpy()))
        drawn = np.log(np.maximum(self.shares, TINY)) / tau + gumbel
        # the share's relative error becomes absolute; then one rounding on each side
        errors = 3 * self.relative / tau + 2 * U * np.abs(drawn)
        rivals = eligible.copy()
        rivals[ids[:keep]] = False
        for rank, expert in enumerate(ids[keep:]):
            better = drawn - errors > drawn[expert] + errors[expert]
            close = drawn + errors >= drawn[expert] - errors[expert]
            close[expert] = False
            surely = (rivals & better & (highest < pool)).sum()
            maybe = (rivals & close & (lowest < pool)).sum()
            if lowest[expert] >= pool or not surely <= rank <= maybe:
                return False
        return True

    def count_bounds(self, ids, following):
        """Return the fewest and the most experts that the row's rule may ask for.

        `following` are the experts that may have the next rank; a bound above
        len(ids) means "more".
        """
        select, k_min, k_max = (
            self.plan["select"],
            self.plan["k_min"],
            self.plan["k_max"],
        )
        if select == Select.MODEL:
            return self.rule.top_k, self.rule.top_k
        bounds = k_max, k_max
        shares, errors = self.shares[ids], self.share_errors[ids]
        if select == Select.TOP_P:
            mass = shares.cumsum()
            off = errors.cumsum() + 2 * len(ids) * U * mass
            limit = self.args[0]
            bounds = 1 + (mass + off <= limit).sum(), 1 + (mass - off <= limit).sum()
        elif select in (Select.RELATIVE, Select.ABSOLUTE):
            bounds = self.run_bounds(shares, errors, following)
        elif select == Select.ENTROPY:
            bounds = self.entropy_bounds(k_min, k_max)
        return tuple(min(max(int(count), k_min), k_max) for count in bounds)

    def run_bounds(self, shares, errors, following):
        least, off = self.args[0], 0.0
        if self.plan["select"] == Select.RELATIVE:
            least, off = least * shares[0], least * (errors[0] + 2 * U * shares[0])
        sure = shares - errors >= least + off
        maybe = shares + errors >= least - off
        sure[0] = maybe[0] = True
        after, wide = self.shares[following], self.share_errors[following]
        sure = [*sure, (after - wide >= least + off).all()]
        maybe = [*maybe, (after + wide >= least - off).any()]
        return np.cumprod(sure).sum(), np.cumprod(maybe).sum()

    def entropy_bounds(self, k_min, k_max):
        shares = np.maximum(self.shares, TINY)
        terms = -self.shares * np.log(shares)
        scale = np.log(len(shares))
        # d(p ln p) = (1 + ln p) dp; the logarithm (2 ulp), product and sum of E terms
        off = (self.share_errors * (1 + np.abs(np.log(shares)))).sum()
        off += 2 * (len(shares) + 8) * U * np.abs(terms).sum()
        low, high = self.args[:2]
        counts = []
        for entropy in ((terms.sum() - off) / scale, (terms.sum() + off) / scale):
            share = (entropy - low) / max(high - low, TINY)
            counts.append(k_min + (k_max - k_min) * min(max(share, 0.0), 1.0))
        off = 8 * U * k_max
        return round(counts[0] - off), round(counts[1] + off)
