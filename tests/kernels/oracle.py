# SPDX-License-Identifier: Apache-2.0
"""The law once more, slow and obvious: one row, float64, plain Python loops.

float32 may decide a near-tie differently. Every comparison of computed numbers goes
through `Row.close`, which notes when two numbers lie nearer than float32 can tell;
such a row is `unsure` and not compared. Comparisons of exact numbers (logits on a
grid) are always sure.
"""

import math
from itertools import pairwise

from moe_tta.plan import FIELDS, Renorm, Select

# scores here are below 8 and carry fewer than 32 roundings: 8 * 32 * 2^-24
SCORE_ERROR = 2.0**-16
INF = float("inf")


def mix32(state, number):
    state = ((state ^ number) + 0x9E3779B9) % 2**32
    state = (state ^ (state >> 16)) * 0x21F0AAAD % 2**32
    state = (state ^ (state >> 15)) * 0xD35A2D97 % 2**32
    return state ^ (state >> 15)


def noise(seed, layer, position, expert):
    state = 0
    for number in (seed % 2**32, (seed >> 32) % 2**32, layer, position, expert):
        state = mix32(state, number)
    return ((state >> 9) + 0.5) / 2**23


class Row:
    """One row's routing; `ids`, `weights` (used ones only) and `unsure` result."""

    def __init__(self, logits, plan, index, rule, width, layer, position):
        self.rule, self.width, self.unsure = rule, width, False
        self.logits = [float(z) for z in logits]
        self.num_experts = len(logits)
        self.plan = {
            name: self.field(plan, name, index, per_expert)
            for name, (_, per_expert, _) in FIELDS.items()
        }
        self.allowed = [e for e in self.all() if self.plan["allow"][e]]
        self.score()
        self.choose_groups()
        self.order = self.sort(self.eligible, self.keys, self.key_error)
        self.select(layer, position)
        self.weigh()

    def all(self):
        return range(self.num_experts)

    def field(self, plan, name, index, per_expert):
        value, neutral = getattr(plan, name), FIELDS[name][2]
        if value is not None:
            return value[index].tolist()
        if name == "select_args":
            return [neutral] * 3
        return [neutral] * self.num_experts if per_expert else neutral

    def close(self, a, b, error):
        """Note whether float32 could swap a and b."""
        self.unsure |= a != b and abs(a - b) <= error

    def sort(self, items, keys, error):
        order = sorted(items, key=lambda e: (-keys[e], e))
        for better, worse in pairwise(order):
            self.close(keys[better], keys[worse], error)
        return order

    def steer(self, values):
        best = max(values[e] for e in self.allowed)
        worst = min(values[e] for e in self.allowed)
        for e in self.all():
            if self.plan["promote"][e]:
                values[e] = best + 0.01
            if self.plan["demote"][e]:
                values[e] = worst - 0.01

    def score(self):
        z = [self.logits[e] + self.plan["bias"][e] for e in self.all()]
        bias = self.rule.correction_bias
        if bias is None:
            self.steer(z)
        softmax = self.rule.scoring in ("softmax", "topk_softmax")
        if softmax:
            total = sum(math.exp(z[e]) for e in self.allowed)
            scores = [math.exp(x) / total for x in z]
        elif self.rule.scoring == "sigmoid":
            scores = [1 / (1 + math.exp(-x)) for x in z]
        else:
            scores = [math.sqrt(math.log1p(math.exp(x))) for x in z]
        self.keys, self.key_error = z, 0.0
        if bias is not None:
            self.keys = [w + c for w, c in zip(scores, bias.tolist(), strict=True)]
            self.steer(self.keys)
            self.key_error = SCORE_ERROR
        elif self.plan["mix"] > 0:
            mix, target = self.plan["mix"], self.plan["target"]
            scores = [(1 - mix) * scores[e] + mix * target[e] for e in self.all()]
            self.keys, self.key_error = scores, SCORE_ERROR
        self.scores = scores
        total = 1.0 if softmax else sum(scores[e] for e in self.allowed)
        self.distribution = [
            scores[e] / total if e in self.allowed else 0.0 for e in self.all()
        ]

    def choose_groups(self):
        self.eligible = self.allowed
        if self.rule.num_expert_group == 1:
            return
        size = self.num_experts // self.rule.num_expert_group
        group_scores = {}
        for e in self.allowed:
            group_scores.setdefault(e // size, []).append(self.keys[e])
        for group, keys in group_scores.items():
            two = sorted(keys, reverse=True)[:2]
            group_scores[group] = (
                max(keys) if self.rule.correction_bias is None else sum(two)
            )
            if any(self.plan["promote"][group * size + i] for i in range(size)):
                group_scores[group] = INF
        best = self.sort(group_scores, group_scores, 2 * self.key_error)
        best = best[: self.rule.topk_group]
        self.eligible = [e for e in self.allowed if e // size in best]

    def select(self, layer, position):
        mode, (a, b, c) = self.plan["select"], self.plan["select_args"]
        k_min, k_max = self.plan["k_min"], self.plan["k_max"]
        score = [self.distribution[e] for e in self.order]
        first, count = 0, k_max
        if mode == Select.TOP_P:
            count = self.run_of_mass(score, a)
        elif mode == Select.RELATIVE:
            count = self.leading_run(score, a * score[0])
        elif mode == Select.ABSOLUTE:
            count = self.leading_run(score, a)
        elif mode == Select.ENTROPY:
            count = self.entropy_count(a, b, k_min, k_max)
        elif mode == Select.RANKS:
            first = min(int(a), len(self.order) - 1)
        elif mode == Select.SAMPLE:
            self.sample(int(a), int(b), c, layer, position)
        if mode == Select.MODEL:
            count = self.rule.top_k
        else:
            count = max(k_min, min(k_max, count))
        self.ids = self.order[first:][: min(count, self.width)]

    def run_of_mass(self, score, mass):
        count, running = 1, 0.0
        for s in score:
            running += s
            self.unsure |= abs(running - mass) <= SCORE_ERROR
            count += running <= mass
        return count

    def leading_run(self, score, least):
        count = 1
        for s in score[1:]:
            self.unsure |= abs(s - least) <= SCORE_ERROR
            if s < least:
                break
            count += 1
        return count

    def entropy_count(self, low, high, k_min, k_max):
        entropy = -sum(p * math.log(p) for p in self.distribution if p > 0)
        entropy /= math.log(self.num_experts)
        if high == low:
            self.unsure |= abs(entropy - low) <= SCORE_ERROR
            return k_max if entropy > low else k_min
        share = min(max((entropy - low) / (high - low), 0.0), 1.0)
        extra = (k_max - k_min) * share
        error = (k_max - k_min) * SCORE_ERROR / (high - low)
        self.unsure |= abs(extra - math.floor(extra) - 0.5) <= error
        return k_min + round(extra)

    def sample(self, keep, pool, tau, layer, position):
        drawn = {}
        for e in self.order[keep:pool]:
            u = noise(self.plan["seed"], layer, position, e)
            gumbel = -math.log(-math.log(u))
            drawn[e] = math.log(self.distribution[e]) / tau + gumbel
        # log p is good to SCORE_ERROR, and is divided by tau
        redrawn = self.sort(drawn, drawn, 2 * SCORE_ERROR * (1 + 1 / tau))
        self.order = self.order[:keep] + redrawn + self.order[max(keep, pool) :]

    def weigh(self):
        weights = [
            0.0 if self.plan["drop"][e] else self.scores[e] * self.plan["scale"][e]
            for e in self.ids
        ]
        renorm = self.plan["renorm"]
        own = self.rule.renormalize or self.rule.scoring == "topk_softmax"
        if (own and renorm == Renorm.MODEL) or renorm == Renorm.ALWAYS:
            total = sum(weights)
            weights = [w / total if total > 0 else 0.0 for w in weights]
        self.weights = [w * self.rule.routed_scaling_factor for w in weights]
