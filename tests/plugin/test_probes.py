# SPDX-License-Identifier: Apache-2.0
"""Rounds by probes end to end: losses, vectors and tokens against transformers.

Three families, two of which the adapter cannot read; prompts are read in chunks.
"""

import logging
import random
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from vllm.exceptions import VLLMValidationError

from moe_tta.vllm_plugin import round_limits
from tests.families import CASES
from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.probed import Replica, complete, rerun
from tests.plugin.probed import heard as heard
from tests.plugin.test_reroute import draw_prompts
from tests.plugin.test_reroute_crowd import check_empty, scheduler_of

TOKENS = 20
SETTINGS = {"adapter": {"gradients": False, "budget": 700, "max_context": 150}}
EXACT = {
    **{"dtype": "float32", "max_model_len": 192, "block_size": 32},
    **{"max_num_batched_tokens": 100, "enable_chunked_prefill": True},
    "additional_config": {"moe_tta": SETTINGS},
}
FAMILIES = ["mixtral", "granitemoe", "glm4_moe"]
SPSA = {"optimizer": "spsa", "steps": 2, "lr": 2.0}
ROUNDS = {"reroute": {**SPSA, "every": 8}}
log = logging.getLogger(__name__)
EPS = torch.finfo(torch.float32).eps
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def llm(tiny_models, family):
    options = next(case.cpu_options for case in CASES if case.name == family)
    with engine(tiny_models(family), **EXACT, **options) as llm:
        yield llm


@pytest.fixture(scope="module")
def shape(llm):
    return llm.llm_engine.input_processor.moe_tta.shape


@pytest.fixture
def exact(family):
    """Requests in one batch leave each other's bits alone (docs/log.md)."""
    if family == "glm4_moe":
        pytest.skip("stock vLLM itself rounds otherwise beside other requests")


def arguments_of(request, shape):
    """Return what the round's work is told, `every` and `mode` left out."""
    asked = {k: v for k, v in request["reroute"].items() if k != "every"}
    return {"layers": shape.layers, **asked}


def test_probes_score_as_transformers(llm, shape, heard, family, tiny_models):
    """At the same vectors, at most twice as far from float64 as float32 must be."""
    layers = list(shape.layers[-2:])
    request = {"reroute": {**SPSA, "every": 0, "layers": layers}}
    for prompt in draw_prompts(2, random.Random(3)):
        complete(llm, prompt, sampling(1, request))
    probes = list(heard.probes.values())
    assert len(probes) == 2 * (2 * 8 + 1)
    asked = {(len(p.tokens), p.bias.numpy().tobytes()) for p in probes}
    assert len(asked) == len(probes)
    exact = Replica(tiny_models(family), shape, torch.float64)
    rough = Replica(tiny_models(family), shape)
    own, theirs = [], []
    for probe in probes:
        want = exact.scores(probe.tokens, probe.bias)
        found = rough.scores(probe.tokens, probe.bias)
        own.append(float((found - want).abs().max()))
        theirs.append(float((probe.scores - want).abs().max()))
    log.info("median error: replica %.2e, probes %.2e", median(own), median(theirs))
    rounding = 16 * EPS  # one rounding of logits up to 16
    assert max(median(own), median(theirs)) < 1e-5  # else the rest says little
    # float32 itself may turn one token to another expert: then one probe says little
    for ours, least in zip(theirs, own, strict=True):
        assert ours <= 2 * max(least, median(own)) + rounding


def test_vectors_and_reports_are_the_estimators(llm, shape, heard):
    """From what the probes said, every round again, bit for bit."""
    prompt = draw_prompts(1, random.Random(6))[0]
    request = {"reroute": {**ROUNDS["reroute"], "skip": 5, "layers": [3, 2]}}
    output = complete(llm, prompt, sampling(TOKENS, request))
    rounds, left = output.outputs[0].moe_tta["rounds"], list(heard.probes.values())
    assert len(rounds) == 3
    before = torch.zeros(len(shape.layers), shape.num_experts)
    for report, edit in zip(rounds, heard.edits, strict=True):
        now, left = left[:17], left[17:]
        number = report["round"]
        done = rerun(shape, arguments_of(request, shape), number, before, now)
        assert torch.equal(done.delta[0], edit)
        assert report["losses"] == done.losses[0].tolist()
        assert report["outcome"] == "adapted"
        assert report["layers"] == [2, 3]
        assert report["start"] == report["context"] - 1 == len(now[0].tokens) - 1
        assert report["milliseconds"] > 0
        assert edit.any()
        before = edit
    assert not left


def test_tokens_obey_the_vectors(llm, shape, heard, family, tiny_models):
    prompt = draw_prompts(1, random.Random(7))[0]
    output = complete(llm, prompt, sampling(TOKENS, ROUNDS))
    starts = [r["start"] for r in output.outputs[0].moe_tta["rounds"]]
    replica = Replica(tiny_models(family), shape)
    assert outputs(output)[0] == replica.greedy(prompt, TOKENS, starts, heard.edits)
    assert outputs(output)[0] != replica.greedy(prompt, TOKENS, [], [])


def test_rate_zero_is_the_model_bit_for_bit(llm):
    prompts = draw_prompts(4, random.Random(4))
    plain = generate(llm, prompts, [sampling(TOKENS)] * 4)
    for mode in ("wait", "overlap"):
        request = {"reroute": {**ROUNDS["reroute"], "lr": 0.0, "mode": mode}}
        assert generate(llm, prompts, [sampling(TOKENS, request)] * 4) == plain


def test_alone_and_beside_others(llm, exact):
    """Two adapted requests, a plain and a steered one: each as it is alone."""
    prompts = draw_prompts(4, random.Random(8))
    other = {"reroute": {**SPSA, "every": 16, "lr": 1.0, "mode": "wait"}}
    steer = {"steer": {"bias": [[3, 0, 2.0]]}}
    params = [sampling(TOKENS, r) for r in (ROUNDS, None, other, steer)]
    alone = [
        generate(llm, [prompt], [asked])[0]
        for prompt, asked in zip(prompts, params, strict=True)
    ]
    assert generate(llm, prompts, params) == alone
    check_empty(llm)


def test_a_report_replays(llm, exact, monkeypatch):
    """Little budget, so that rows go ahead under the version before."""
    monkeypatch.setattr(scheduler_of(llm).rounds, "_budget", 250)
    prompt = draw_prompts(1, random.Random(12))[0]
    request = {"reroute": {**ROUNDS["reroute"], "mode": "overlap"}}
    first = complete(llm, prompt, sampling(TOKENS, request))
    rounds = first.outputs[0].moe_tta["rounds"]
    pairs = [[r["context"], r["start"]] for r in rounds]
    assert any(start >= context for context, start in pairs)
    again = complete(
        llm, prompt, sampling(TOKENS, {"reroute": {**SPSA, "replay": pairs}})
    )
    assert outputs(again) == outputs(first)
    for one, other in zip(rounds, again.outputs[0].moe_tta["rounds"], strict=True):
        assert one["losses"] == other["losses"]


@pytest.mark.parametrize("optimizer", ["adam", "sgd", None])
def test_no_gradients_no_silent_switch(llm, optimizer):
    asked = {} if optimizer is None else {"optimizer": optimizer}
    words = f"expected 'spsa', got '{optimizer or 'adam'}'.*adapter.gradients to false"
    with pytest.raises(VLLMValidationError, match=words) as error:
        generate(llm, [[5, 6, 7]], [sampling(4, {"reroute": asked})])
    assert error.value.parameter == "moe_tta.reroute.optimizer"


def test_text_too_long(llm):
    output = complete(llm, [5] * 145, sampling(TOKENS, ROUNDS))
    rounds = output.outputs[0].moe_tta["rounds"]
    assert [r["outcome"] for r in rounds] == ["adapted", "text too long"]
    assert status(llm)["jobs"] == 0


BAD = [
    (name, value, rf"{name} or optimizer 'spsa', not both.*all MoE layers")
    for name, value in (("choice", "hard"), ("share", 0.5), ("sign", 1))
]


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_what_spsa_cannot_do(llm, name, value, words):
    asked = {"reroute": {"optimizer": "spsa", name: value}}
    with pytest.raises(VLLMValidationError, match=words):
        generate(llm, [[5, 6, 7]], [sampling(4, asked)])


def test_engines_that_score_no_text():
    def reason(mode="raw_logprobs", fast=False):
        return round_limits.probe_reason(
            SimpleNamespace(
                model_config=SimpleNamespace(logprobs_mode=mode),
                cache_config=SimpleNamespace(kv_sharing_fast_prefill=fast),
            )
        )

    assert reason() is None
    assert "this engine gives raw_logits" in reason("raw_logits")
    assert "--kv-sharing-fast-prefill" in reason(fast=True)
