# SPDX-License-Identifier: Apache-2.0
"""What `moe-tta verify` asks of a running engine: one function per check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from moe_tta.shape import RouterShape
from moe_tta.strategies.base import as_ranges
from moe_tta.vllm_plugin.pair_limits import engine_reason
from moe_tta.vllm_plugin.verify_engine import Generated, Request, Subject, expect

PROMPT, TOKENS = 24, 12
ROWS = PROMPT + TOKENS - 1  # the last token is sampled and never routed
NEUTRAL_TOKENS = 16
NEUTRAL_PROMPTS = 6
PREFIX_TOKENS = 200  # more than a KV block on any device: 128 on CPU


def armed(subject: Subject) -> str:
    """Every MoE layer of the model's config carries the hook."""
    shape = subject.shape
    layers = subject.llm.collective_rpc("moe_tta_status")[0]["armed_layers"]
    expect(
        tuple(layers) == shape.layers,
        f"armed layers {layers}, the config's MoE layers are {list(shape.layers)}",
    )
    return (
        f"{len(layers)}/{len(shape.layers)} layers ({as_ranges(shape.layers)}), "
        f"{shape.num_experts} experts, top-{shape.top_k}"
    )


def fires(subject: Subject) -> str:
    """Edits change the text's probabilities, and the experts are as asked."""
    (prompt,) = subject.prompts([PROMPT], seed=1)
    asked = [None, demote_half(subject.shape)]
    if subject.shape.top_k > 1:
        asked.append({"dynamic_k": {"k": 1}})
    runs = [subject.generate([prompt], [request], [TOKENS])[0] for request in asked]
    for request, run in zip(asked[1:], runs[1:], strict=True):
        changed = run.logprobs != runs[0].logprobs
        expect(changed, f"{_name(request)}: logprobs are those of a plain request")
    words = " and k=1" if len(runs) == 3 else ""
    evidence = [f"demote{words}: logprobs change"]
    if subject.traces is None:
        return evidence[0] + "; experts unseen, traces work on CPU only"
    # a trace is filed with the step after its request's last
    subject.generate([prompt], [None], [1])
    evidence.append(_demoted_are_absent(subject, runs[1]))
    if len(runs) == 3:
        evidence.append(_one_expert_each(subject, runs[2]))
    return "; ".join(evidence)


def _demoted_are_absent(subject: Subject, run: Generated) -> str:
    trace = subject.trace(run, ROWS)
    demoted = _half(subject.shape)
    would = np.isin(trace["stock_ids"], demoted).any(-1)  # [rows, layers]
    does = np.isin(trace["topk_ids"], demoted).any(-1)
    expect(
        not does.any(),
        f"{does.sum()} of {does.size} rows x layers use a demoted expert",
    )
    expect(would.any(0).all(), "the model itself never chose the demoted experts")
    return f"demoted experts on 0 of {does.size} rows x layers (stock: {would.sum()})"


def _one_expert_each(subject: Subject, run: Generated) -> str:
    used = (subject.trace(run, ROWS)["topk_weights"] != 0).sum(-1)
    expect((used == 1).all(), f"k=1: rows use {used.min()} to {used.max()} experts")
    return f"k=1: 1 expert on all {used.size}"


def neutral(subject: Subject, stock: bool) -> dict[str, list[list[Any]]]:
    """Return what plain and neutral requests generate, to compare with stock vLLM."""
    forms: dict[str, Request] = {"plain": None}
    if not stock:
        forms["{}"] = {}
        forms["own k"] = {"dynamic_k": {"k": subject.shape.top_k}}
    prompts = subject.prompts([5 + 13 * n for n in range(NEUTRAL_PROMPTS)], seed=2)
    count = len(prompts)
    done = {
        form: subject.generate(prompts, [request] * count, [NEUTRAL_TOKENS] * count)
        for form, request in forms.items()
    }
    return {form: [[g.tokens, g.logprobs] for g in runs] for form, runs in done.items()}


def isolated(subject: Subject) -> str:
    """What a request generates does not depend on its neighbours' plans.

    The batch stays the same, row by row: in another one kernels may round otherwise,
    and outputs could differ without a leak.
    """
    asked = mixed_requests(subject.shape)
    count = len(asked)
    prompts = subject.prompts([6 + 7 * n for n in range(count)], seed=3)
    # unequal lengths: the batch's company changes while it runs
    tokens = [TOKENS - n % 4 for n in range(count)]
    together = subject.generate(prompts, asked, tokens)
    plain = subject.generate(prompts, [None] * count, tokens)
    differing = []
    for index, request in enumerate(asked):
        among_plain = plain
        if request is not None:
            only = [request if n == index else None for n in range(count)]
            among_plain = subject.generate(prompts, only, tokens)
        if among_plain[index][1:3] != together[index][1:3]:
            differing.append(_name(request))
    expect(
        not differing,
        f"{len(differing)} of {count} requests differ by their neighbours' plans: "
        + ", ".join(differing),
    )
    return f"{count} requests, {count - 2} plans: neighbours' plans change nothing"


def contrast(subject: Subject) -> str:
    """Two streams are combined as asked, and leave nothing behind."""
    reason = engine_reason(subject.llm.llm_engine.vllm_config)
    if reason is not None:
        return f"not offered: {reason}"
    (prompt,) = subject.prompts([PROMPT], seed=6)
    weak = demote_half(subject.shape)
    asked = [
        None,
        {"contrast": {"weak": weak, "beta": 2.0, "alpha": 0.0}},
        {"contrast": {"weak": weak, "beta": 0.0, "alpha": 0.0}},
        {"contrast": {"weak": {}, "beta": 2.0, "alpha": 0.0}},
    ]
    runs = [subject.generate([prompt], [request], [TOKENS])[0] for request in asked]
    plain, strong, nothing, equal = (run.logprobs for run in runs)
    expect(strong != plain, "contrast: logprobs are those of a plain request")
    expect(strong != nothing, "contrast: beta changes nothing")
    expect(nothing == equal, "beta 0 and equal streams say different things")
    # the worker learns of a finished request with its next step
    subject.generate([prompt], [None], [1])
    left = subject.llm.collective_rpc("moe_tta_status")[0]["pairs"]
    expect(not left, f"{left} pairs are left behind")
    return "logprobs change; beta 0 equals equal streams; 0 pairs left"


def prefix_cache(subject: Subject) -> str:
    """KV made under one plan serves that plan only."""
    shape = subject.shape
    a, b = demote_half(shape), {"steer": {"promote": every(shape, [0])}}
    prompt = subject.prompts([PREFIX_TOKENS], seed=4)
    subject.llm.reset_prefix_cache()
    cached = [subject.resume(prompt, [plan], [2])[0].cached for plan in (a, b, None, a)]
    evidence = f"plans A, B, none, A: {', '.join(map(str, cached))} cached tokens"
    expect(cached[:3] == [0, 0, 0] and cached[3] > 0, evidence)
    return evidence


def clean(subject: Subject) -> str:
    """Finished requests leave nothing behind."""
    (prompt,) = subject.prompts([8], seed=5)
    # the worker learns of a finished request with its next step
    for request in (demote_half(subject.shape), None):
        subject.generate([prompt], [request], [1])
    held = subject.llm.collective_rpc("moe_tta_status")[0]
    evidence = (
        f"{held['requests_with_plan']} requests with a plan, "
        f"{held['slots_in_use']} slots in use"
    )
    expect(not held["requests_with_plan"] and not held["slots_in_use"], evidence)
    return evidence


CHECKS: dict[str, Callable[[Subject], str]] = {
    "armed": armed,
    "fires": fires,
    "isolated": isolated,
    "contrast": contrast,
    "prefix-cache": prefix_cache,
    "clean": clean,
}


def every(shape: RouterShape, experts: Sequence[int]) -> list[list[int]]:
    """Name these experts in every MoE layer."""
    return [[layer, expert] for layer in shape.layers for expert in experts]


def _half(shape: RouterShape) -> list[int]:
    """Name half the experts, or as many as can stay unused."""
    return list(range(min(shape.num_experts // 2, shape.num_experts - shape.top_k)))


def demote_half(shape: RouterShape) -> dict[str, Any]:
    """Return a request that keeps the experts of `_half` unused in every layer."""
    return {"steer": {"demote": every(shape, _half(shape))}}


def mixed_requests(shape: RouterShape) -> list[Request]:
    """Return requests of every kind, two plain ones among them."""
    layers, half = shape.layers, _half(shape)
    rest = list(range(len(half), shape.num_experts))
    return [
        None,
        demote_half(shape),
        {"steer": {"promote": every(shape, rest[-1:]), "span": "generated"}},
        {"steer": {"allow": {str(layer): rest for layer in layers}, "span": "prompt"}},
        {"steer": {"bias": [[layer, rest[0], 2.0] for layer in layers]}},
        None,
        {"steer": {"scale": [[layer, e, 0.5] for layer in layers for e in rest]}},
        {"steer": {"drop": every(shape, half), "span": "last_prompt"}},
        {"dynamic_k": {"p": 0.3}},
        {"dynamic_k": {"k": 1, "span": "generated"}, "renorm": "never"},
    ]


def _name(request: Request) -> str:
    """Name a request by its members: `steer.demote`."""
    names = [
        f"{member}.{'+'.join(value)}" if isinstance(value, dict) else member
        for member, value in (request or {}).items()
    ]
    return " and ".join(names) or "a plain request"
