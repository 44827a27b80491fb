# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402 - vLLM must find Triton before it defines its kernels
"""vLLM's own V2 sampler and request states with pairs, on a CPU.

Its Triton kernels and ours run interpreted: `python -m pytest` on this file with
TRITON_INTERPRET=1, in a process that has imported neither (`test_v2_sampler.py`).
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton
import triton.language
import vllm.triton_utils

# vLLM finds no Triton driver on a CPU and would define no kernels
vllm.triton_utils.triton = triton
vllm.triton_utils.tl = triton.language

from vllm import SamplingParams
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.input_batch import post_update
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from moe_tta.kernels.contrast import contrast_logits
from moe_tta.vllm_plugin.pair_rows import PairRows, kernels
from moe_tta.vllm_plugin.pairs import FOLLOWER, PAIR, Link
from moe_tta.vllm_plugin.runner_seams import _pair_sampler_v2

buffer_utils.is_uva_available = lambda: False  # no pinned memory either

VOCAB, PROMPT, LENGTH, PLACES = 97, 5, 32, 12
CPU = torch.device("cpu")
NUMBERS = (0.7, 0.05)
CASES = {
    "greedy": {"temperature": 0.0},
    "seeded": {"temperature": 0.9, "seed": 5},
    "unseeded": {"temperature": 1.0},
    "filters": {"temperature": 1.3, "seed": 6, "top_k": 9, "top_p": 0.8, "min_p": 0.02},
    "penalties": {
        "temperature": 0.0,
        "repetition_penalty": 1.7,
        "frequency_penalty": 0.9,
        "presence_penalty": 0.4,
    },
    "bias": {"temperature": 0.0, "logit_bias": {3: 4.0}, "min_tokens": 4},
    "allowed": {"temperature": 1.0, "seed": 2, "allowed_token_ids": [7, 8, 9, 30]},
}


class Runner:
    """As much of the V2 runner as sampling needs."""

    def __init__(self, paired):
        self.states = RequestState(
            PLACES, LENGTH, 64, 0, VOCAB, CPU, use_dense_all_token_ids=True
        )
        config = SimpleNamespace(
            reasoning_config=None,
            speculative_config=None,
            scheduler_config=SimpleNamespace(max_num_seqs=PLACES),
            model_config=SimpleNamespace(max_model_len=LENGTH),
        )
        self.sampler = Sampler(config, PLACES, VOCAB, CPU, self.states)
        self.pairs = PairRows(CPU, kernels(PLACES // 2, VOCAB, CPU))
        if paired:
            _pair_sampler_v2(self.sampler, SimpleNamespace(pairs=self.pairs))

    def add(self, req_id, params):
        prompt = [sum(map(ord, req_id[:1])) % VOCAB, 3, 4, 3, 1]
        self.states.add_request(req_id, PROMPT, prompt, 0, LENGTH - PROMPT)
        self.sampler.add_request(self.states.req_id_to_index[req_id], params)
        new = SimpleNamespace(req_id=req_id, sampling_params=params)
        self.pairs.requests_changed([], [new])
        self.states.apply_staged_writes()
        self.sampler.apply_staged_writes()

    def batch(self, req_ids, seq_lens):
        places = [self.states.req_id_to_index[req_id] for req_id in req_ids]
        count = len(req_ids)
        lens = torch.tensor(seq_lens, dtype=torch.int32)
        return SimpleNamespace(
            req_ids=req_ids,
            num_reqs=count,
            idx_mapping=torch.tensor(places, dtype=torch.int32),
            idx_mapping_np=np.array(places),
            expanded_idx_mapping=torch.tensor(places, dtype=torch.int32),
            expanded_local_pos=torch.zeros(count, dtype=torch.int32),
            cu_num_logits=torch.arange(count + 1, dtype=torch.int32),
            cu_num_logits_np=np.arange(count + 1, dtype=np.int32),
            logits_indices=torch.arange(count),
            positions=(lens - 1).long(),
            input_ids=torch.zeros(count, dtype=torch.int32),
            seq_lens=lens,
            seq_lens_cpu_upper_bound=lens,
        )

    def step(self, logits, req_ids, seq_lens):
        """Sample, and update the states as the runner does after it."""
        batch = self.batch(req_ids, seq_lens)
        output = self.sampler(logits, batch)
        post_update(
            batch.idx_mapping,
            self.states.num_computed_tokens.gpu,
            self.states.last_sampled_tokens,
            self.sampler.penalties_state.output_bin_counts,
            output.sampled_token_ids,
            output.num_sampled,
            output.num_rejected,
            None,
            self.states.all_token_ids.gpu,
            self.states.total_len.gpu,
        )
        return output

    def text(self, req_id):
        place = self.states.req_id_to_index[req_id]
        length = int(self.states.total_len.gpu[place])
        return self.states.all_token_ids.gpu[place, :length].tolist()

    def last(self, req_id):
        place = self.states.req_id_to_index[req_id]
        return int(self.states.last_sampled_tokens[place])


def follower_params(lead, temperature):
    link = Link(lead, "contrast", NUMBERS).to_wire()
    return SamplingParams(temperature=temperature, extra_args={PAIR: link})


def make(paired, options):
    np.random.seed(3)  # unseeded requests draw their seeds from it
    runner = Runner(paired)
    params = SamplingParams(logprobs=2, max_tokens=8, **options)
    runner.add("a", params)
    runner.add("p", SamplingParams(temperature=0.0, logprobs=2))
    runner.add("a" + FOLLOWER, follower_params("a", params.temperature))
    return runner


ORDER = ["a" + FOLLOWER, "p", "a"]


def draw(step, dtype):
    generator = torch.Generator().manual_seed(step)
    logits = torch.randn(3, VOCAB, generator=generator) * 3
    logits[2, 40:60] = -torch.inf  # a grammar masks the lead's row alone
    return logits.to(dtype)


def combined(logits):
    """The law, computed beside the sampler."""
    out = logits.float().clone()
    out[2:] = contrast_logits(logits[2:], logits[:1], *NUMBERS)
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_leads_sample_from_the_combination(name, dtype):
    """Our sampler on two rows is vLLM's own on combined logits, step by step."""
    ours, stock = make(True, CASES[name]), make(False, CASES[name])
    for step in range(4):
        logits = draw(step, dtype)
        lens = [PROMPT + step] * 3
        want = stock.step(combined(logits), ORDER, lens)
        got = ours.step(logits.clone(), ORDER, lens)
        theirs, mine = want.sampled_token_ids[:, 0], got.sampled_token_ids[:, 0]
        assert mine[1:].tolist() == theirs[1:].tolist()
        assert mine[0] == mine[2]
        for member in ("logprobs", "logprob_token_ids", "selected_token_ranks"):
            a = getattr(got.logprobs_tensors, member)[1:]
            assert torch.equal(a, getattr(want.logprobs_tensors, member)[1:])
        assert ours.last("a" + FOLLOWER) == ours.last("a")
    assert ours.text("a") == stock.text("a")
    assert ours.text("a" + FOLLOWER) == ours.text("a")
    assert len(ours.text("a")) == PROMPT + 4
    assert not set(ours.text("a")[PROMPT:]) & set(range(40, 60))


def test_the_contrast_changes_tokens():
    """Without it the two samplers would agree on anything."""
    ours, stock = make(True, CASES["greedy"]), make(False, CASES["greedy"])
    for step in range(12):
        logits = draw(step, torch.float32)
        stock.step(logits.clone(), ORDER, [PROMPT + step] * 3)
        ours.step(logits, ORDER, [PROMPT + step] * 3)
    assert ours.text("a") != stock.text("a")
    assert ours.text("p") == stock.text("p")


def test_rows_that_still_read_their_prompt_say_nothing():
    runner = make(True, CASES["greedy"])
    output = runner.step(draw(0, torch.float32), ORDER, [PROMPT - 1, PROMPT, 2])
    assert output.num_sampled.tolist() == [0, 1, 0]
    assert len(runner.text("a")) == len(runner.text("a" + FOLLOWER)) == PROMPT


def test_a_step_without_pairs_is_stock():
    ours, stock = make(True, CASES["seeded"]), make(False, CASES["seeded"])
    logits = draw(1, torch.bfloat16)[1:2]
    before = logits.clone()
    got = ours.step(logits, ["p"], [PROMPT])
    want = stock.step(before.clone(), ["p"], [PROMPT])
    assert torch.equal(logits, before)
    assert torch.equal(got.sampled_token_ids, want.sampled_token_ids)
    assert torch.equal(got.logprobs_tensors.logprobs, want.logprobs_tensors.logprobs)
