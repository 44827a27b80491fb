# SPDX-License-Identifier: Apache-2.0
"""Random but valid requests, drawn from every member the issue of plans knows."""

import math

from moe_tta.plan import MAX_RECALLED

SPANS = ("all", "prompt", "generated", "last_prompt")


def random_request(rng, shape, tokens=None):
    """Return a random `moe_tta` object for the model, `None` one time in six.

    `tokens` is a token store that the engine names `learned`, for `knn`.
    """
    if rng.random() < 1 / 6:
        return None
    request = {}
    if rng.random() < 0.8:
        request["steer"] = _steer(rng, shape)
    if rng.random() < 0.5:
        request["dynamic_k"] = _dynamic_k(rng, shape)
    if rng.random() < 0.3 and shape.is_distribution:
        request["remix"] = _remix(rng, shape)
    elif tokens is not None and rng.random() < 0.5:
        request["knn"] = _knn(rng, tokens)
    if rng.random() < 0.3:
        request["renorm"] = rng.choice(["always", "never", "model"])
    return request


def _pairs(rng, shape, count):
    cells = [(layer, e) for layer in shape.layers for e in range(shape.num_experts)]
    return [list(cell) for cell in rng.sample(cells, count)]


def _steer(rng, shape):
    steer = {"span": rng.choice(SPANS)}
    layers = list(shape.layers)
    for name in rng.sample(["edits", "allow", "bias", "scale", "drop"], 2):
        if name == "edits":
            layer = rng.choice(layers)
            chosen = rng.sample(range(shape.num_experts), 2)
            steer["promote"] = [[layer, chosen[0]]]
            steer["demote"] = [[layer, chosen[1]]]
        elif name == "allow":
            # a promoted expert must stay allowed
            promoted = [e for _, e in steer.get("promote", [])]
            experts = promoted + _allowed(rng, shape, promoted)
            steer["allow"] = {str(rng.choice(layers)): experts}
        elif name == "bias":
            steer["bias"] = [[*p, rng.uniform(-4, 4)] for p in _pairs(rng, shape, 4)]
        elif name == "scale":
            steer["scale"] = [[*p, rng.uniform(0, 3)] for p in _pairs(rng, shape, 4)]
        else:
            steer["drop"] = _pairs(rng, shape, 3)
    if "allow" in steer and "promote" in steer:
        promoted = steer["promote"][0]
        steer["allow"] = {
            layer: sorted({*experts, promoted[1]})
            for layer, experts in steer["allow"].items()
        }
    return steer


def _allowed(rng, shape, promoted):
    """Return experts beside the promoted: any groups of a token hold enough of them."""
    per_group = shape.num_experts // shape.num_expert_group
    keep = max(math.ceil(shape.k_max / shape.topk_group), per_group // 2)
    chosen = []
    for first in range(0, shape.num_experts, per_group):
        rest = [e for e in range(first, first + per_group) if e not in promoted]
        chosen += rng.sample(rest, min(keep, len(rest)))
    return chosen


def _dynamic_k(rng, shape):
    if rng.random() < 0.5:
        return {"k": rng.randint(1, shape.k_max), "span": rng.choice(SPANS)}
    k_min = rng.randint(1, shape.k_max)
    return {"p": rng.random(), "k_min": k_min, "k_max": rng.randint(k_min, shape.k_max)}


def _remix(rng, shape):
    """Return distributions for some layers, as gradient descent would send them."""
    drawn = {}
    for layer in rng.sample(list(shape.layers), min(2, len(shape.layers))):
        values = [rng.random() ** 4 for _ in range(shape.num_experts)]
        drawn[str(layer)] = [value / math.fsum(values) for value in values]
    span = rng.choice(["last_prompt", "last_prompt+generated"])
    return {"distribution": drawn, "alpha": rng.choice([0, 0.3]), "span": span}


def _knn(rng, tokens):
    most = min(MAX_RECALLED, tokens.card.counts.tokens)
    held = sorted(rng.sample(tokens.card.layers, min(2, len(tokens.card.layers))))
    knn = {"store": "learned", "k": rng.randint(1, most), "span": rng.choice(SPANS)}
    if held == list(range(held[0], held[-1] + 1)):
        knn["layers"] = [held[0], held[-1]]
    return knn


def random_prompt(rng, prefixes, vocab=256):
    """Return token ids that often start with one of the shared prefixes."""
    tail = [rng.randrange(2, vocab) for _ in range(rng.randrange(3, 60))]
    return rng.choice(prefixes) + tail
