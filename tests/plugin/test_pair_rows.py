# SPDX-License-Identifier: Apache-2.0
"""The worker's half of a pair: rows found, combined, and tokens handed over."""

from types import SimpleNamespace

import torch

from moe_tta.kernels.contrast import contrast_logits
from moe_tta.vllm_plugin.pair_rows import PairRows, give_followers_tokens, plain_torch
from moe_tta.vllm_plugin.pairs import FOLLOWER, PAIR, Ask, Link
from moe_tta.vllm_plugin.runner_seams import _pair_sampler_v2


def scheduled(req_id, link=None):
    extra_args = None if link is None else {PAIR: link.to_wire()}
    params = SimpleNamespace(extra_args=extra_args)
    return SimpleNamespace(req_id=req_id, sampling_params=params)


def follower(lead, *numbers):
    return scheduled(lead + FOLLOWER, Link(lead, "contrast", numbers))


def two_pairs():
    rows = PairRows(torch.device("cpu"), plain_torch())
    rows.requests_changed([], [scheduled("a"), follower("a", 0.5, 0.1)])
    rows.requests_changed([], [scheduled("b"), follower("b", 2.0, 0.0), scheduled("c")])
    return rows


def test_rows_follow_the_batch_order():
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    order = ["b" + FOLLOWER, "a", "c", "b", "a" + FOLLOWER]
    rows = two_pairs()
    found = rows.rows(order)
    out = rows.combine(logits.clone(), found)
    want = logits.clone()
    want[1] = contrast_logits(logits[1:2], logits[4:5], 0.5, 0.1)[0]
    want[3] = contrast_logits(logits[3:4], logits[0:1], 2.0, 0.0)[0]
    assert torch.equal(out, want)
    sampled = torch.tensor([[9], [1], [2], [3], [8]], dtype=torch.int32)
    give_followers_tokens(sampled, found)
    assert sampled.tolist() == [[3], [1], [2], [3], [1]]


def test_a_step_with_one_of_two_is_left_alone():
    """The other one reads its prompt, or waits: nothing is sampled."""
    rows = two_pairs()
    assert rows.rows(["a", "c", "b" + FOLLOWER]) == {}
    logits = torch.zeros(3, 4, dtype=torch.bfloat16)
    assert rows.combine(logits, {}) is logits


def test_half_precision_is_combined_in_float32():
    logits = torch.randn(2, 16).bfloat16()
    rows = two_pairs()
    out = rows.combine(logits, rows.rows(["a", "a" + FOLLOWER]))
    assert out.dtype == torch.float32
    assert torch.equal(out[:1], contrast_logits(logits[:1], logits[1:], 0.5, 0.1))


def test_rows_are_found_anew_when_the_batch_changes_only():
    """vLLM's V1 runner changes its list of requests in place."""
    rows = two_pairs()
    order = ["a", "a" + FOLLOWER, "b", "b" + FOLLOWER]
    first = rows.rows(order)
    assert rows.rows(list(order)) is first
    order[:] = order[2:] + order[:2]
    second = rows.rows(order)
    assert second["contrast"].leads.tolist() == [2, 0]
    rows.requests_changed([], [follower("c", 1.0, 0.1)])
    assert rows.rows([*order, "c", "c" + FOLLOWER])["contrast"].leads.tolist() == [
        *(2, 0, 4)
    ]
    rows.requests_changed(["a" + FOLLOWER], [])
    assert rows.rows(order)["contrast"].leads.tolist() == [0]


def test_finished_followers_are_forgotten():
    rows = two_pairs()
    rows.requests_changed({"a", "a" + FOLLOWER}, [])
    assert list(rows.links) == ["b" + FOLLOWER]
    assert rows.rows(["a", "a" + FOLLOWER]) == {}


def test_the_v2_runners_sampler_is_wrapped_in_place():
    """`SamplerV2` stands for vLLM's: called as an object, asked for its attributes."""

    class SamplerV2:
        def __init__(self):
            self.states = "kept"

        def __call__(self, logits, input_batch):
            sampled = logits.argmax(dim=1, keepdim=True).int()
            return SimpleNamespace(sampled_token_ids=sampled)

    sampler = SamplerV2()
    _pair_sampler_v2(sampler, SimpleNamespace(pairs=two_pairs()))
    assert isinstance(sampler, SamplerV2)
    assert sampler.states == "kept"
    logits = torch.tensor([[3.0, 2.9, 0.0], [9.0, 0.0, 0.0]])
    batch = SimpleNamespace(req_ids=["b", "b" + FOLLOWER])
    output = sampler(logits, batch)
    assert output.sampled_token_ids.tolist() == [[1], [1]]


def test_an_ask_is_taken_from_its_own_request_only():
    """The n completions of a prompt share one dict of extra_args."""
    ask = Ask("contrast", (0.5, 0.1), {"moe_tta": {"segments": []}}, "salt")
    shared = {"x": 1, PAIR: ask.to_wire()}
    first, second = (
        SimpleNamespace(sampling_params=SimpleNamespace(extra_args=shared))
        for _ in range(2)
    )
    assert Ask.take(first) == ask
    assert first.sampling_params.extra_args == {"x": 1}
    assert Ask.take(first) is None
    assert Ask.take(second) == ask
