# SPDX-License-Identifier: Apache-2.0
"""What rounds are refused for, what goes wrong in them, and what they keep apart."""

import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from prometheus_client import REGISTRY
from vllm.exceptions import VLLMValidationError

from moe_tta.adapter import AdapterError
from moe_tta.adapter.tail import Tail
from moe_tta.settings import EngineSettings, SettingsError
from moe_tta.vllm_plugin import adapter_loading, round_limits
from moe_tta.vllm_plugin.model_shape import UnsupportedModelError
from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.test_reroute import draw_prompts
from tests.plugin.test_reroute_crowd import check_empty, scheduler_of

EXACT = {"dtype": "float32", "max_model_len": 192, "block_size": 32}
ADAPTER = {"budget": 10**6, "max_context": 100}
REROUTE = {"reroute": {"every": 8, "steps": 1, "lr": 0.5}}
PROMPT = list(range(3, 63))


@pytest.fixture(scope="module")
def llm(tiny_models):
    options = {"additional_config": {"moe_tta": {"adapter": ADAPTER}}}
    with engine(tiny_models("mixtral"), **EXACT, **options) as llm:
        yield llm


pytestmark = pytest.mark.usefixtures("one_thread")


def complete(llm, prompt, params):
    [output] = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
    return output.outputs[0]


BAD = [
    ({"steps": 0}, "reroute.steps", "greater than or equal to 1"),
    ({"steps": 2.5}, "reroute.steps", "an integer"),
    ({"every": 3}, "reroute.every", "0 or at least 8"),
    ({"every": 2**40}, "reroute.every", "less than or equal"),
    ({"lr": -1}, "reroute.lr", "greater than or equal to 0"),
    ({"optimizer": "lion"}, "reroute.optimizer", "'adam', 'sgd' or 'spsa'"),
    ({"sign": 0}, "reroute.sign", "1 or -1"),
    ({"mode": "later"}, "reroute.mode", "'wait' or 'overlap'"),
    ({"layers": []}, "reroute.layers", "at least 1"),
    ({"layers": [1, 7]}, r"reroute.layers\[1\]", r"MoE layers \(0-3\), got 7"),
    ({"layers": [1], "share": 0.5}, "reroute", "share or layers"),
    ({"replay": [[9, 8]], "every": 8}, "reroute", "every or replay"),
    ({"replay": [[9, 7]]}, "reroute.replay", "each start at least"),
    ({"replay": [[9, 8], [9, 9]]}, "reroute.replay", "growing contexts"),
    ({"replay": [[9]]}, r"reroute.replay\[0\]", r"\[context, start\]"),
    ({"momentum": 1}, "reroute.momentum", "unknown member"),
]


@pytest.mark.parametrize(("members", "path", "words"), BAD)
def test_bad_members(llm, members, path, words):
    with pytest.raises(VLLMValidationError, match=words) as error:
        generate(llm, [PROMPT], [sampling(moe_tta={"reroute": members})])
    assert error.match(path) or error.value.parameter


@pytest.mark.parametrize(
    ("request_", "prompt", "words"),
    [
        ({**REROUTE, "contrast": {"weak": {"rank": 2}}}, PROMPT, "not beside contrast"),
        ({"contrast": {"weak": REROUTE}}, PROMPT, "unknown member"),
        (REROUTE, list(range(2, 103)), "at most 100 tokens"),
    ],
)
def test_refused_requests(llm, request_, prompt, words):
    with pytest.raises(VLLMValidationError, match=words):
        generate(llm, [prompt], [sampling(moe_tta=request_)])


def test_refused_where_the_operator_did_not_ask_for_it():
    reason = round_limits.engine_reason(None, enabled=False)
    assert "its operator can set adapter" in reason


def test_settings_name_what_is_wrong():
    with pytest.raises(SettingsError, match=r"adapter\.budget"):
        EngineSettings.read({"adapter": {"budget": 0}})
    with pytest.raises(SettingsError, match="known: batch_tokens, budget, gradients"):
        EngineSettings.read({"adapter": {"bugdet": 5}})


def test_a_family_without_gradients_is_refused_at_load(tiny_models):
    options = {"additional_config": {"moe_tta": {"adapter": {}}}}
    with (
        pytest.raises(UnsupportedModelError, match="through 'granitemoe' models"),
        engine(tiny_models("granitemoe"), **EXACT, **options),
    ):
        pass


def test_experts_that_reorder_weights_are_refused():
    """Shapes do not tell: FlashInfer's kernels have gate and up swapped."""
    experts = torch.nn.Module()
    experts.quant_method = SimpleNamespace(moe_kernel=None)
    model = torch.nn.ModuleDict({"experts": experts})
    adapter_loading._refuse_other_layouts(model)
    experts.quant_method.moe_kernel = SimpleNamespace(fused_experts=object())
    with pytest.raises(AdapterError, match=r"order of their own.*--moe-backend triton"):
        adapter_loading._refuse_other_layouts(model)


def rounds_counted():
    """Return rounds by outcome, of all models that this process has served."""
    counted = Counter()
    for metric in REGISTRY.collect():
        if metric.name == "moe_tta:rounds":
            for sample in metric.samples:
                if sample.name.endswith("_total"):
                    counted[sample.labels["outcome"]] += sample.value
    return counted


FAILURES = [
    (torch.OutOfMemoryError("full"), "out of memory"),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), "failed"),
    (None, "loss or gradient not finite"),
]


@pytest.mark.parametrize(("error", "outcome"), FAILURES)
def test_what_fails_goes_on_unadapted(llm, monkeypatch, error, outcome):
    """Tokens of the model, a flag in the report and the metrics; others as ever."""
    other = draw_prompts(1, random.Random(8))[0]
    plain = generate(llm, [PROMPT], [sampling(20)])
    steer = sampling(20, {"steer": {"promote": [[1, 0]]}})
    steered = generate(llm, [other], [steer])
    whole = Tail._loss

    def broken(self, *inputs):
        if error is not None:
            raise error
        return whole(self, *inputs) * float("nan")

    monkeypatch.setattr(Tail, "_loss", broken)
    before = rounds_counted().get(outcome, 0)
    mine, theirs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in (PROMPT, other)],
        [sampling(20, REROUTE), steer],
        use_tqdm=False,
    )
    assert [outputs(mine)] == plain
    assert [outputs(theirs)] == steered
    rounds = mine.outputs[0].moe_tta["rounds"]
    assert [r["outcome"] for r in rounds] == [outcome] * 3
    assert rounds_counted()[outcome] == before + 3
    check_empty(llm)


def test_a_round_that_fails_keeps_the_version_before(llm, monkeypatch):
    whole = complete(llm, PROMPT, sampling(7, REROUTE))
    run, calls = Tail._loss, []

    def broken(self, *inputs):
        calls.append(1)
        if len(calls) > 1:  # the last loss of the first round
            raise torch.OutOfMemoryError("full")
        return run(self, *inputs)

    monkeypatch.setattr(Tail, "_loss", broken)
    got = complete(llm, PROMPT, sampling(20, REROUTE))
    outcomes = [r["outcome"] for r in got.moe_tta["rounds"]]
    assert outcomes == ["adapted", "out of memory", "out of memory"]
    assert list(got.token_ids)[:7] == list(whole.token_ids)
    monkeypatch.undo()
    once = {"reroute": {**REROUTE["reroute"], "every": 0}}
    [(tokens, _)] = generate(llm, [PROMPT], [sampling(20, once)])
    assert list(got.token_ids) == tokens


def test_adapted_blocks_serve_nobody_else(llm):
    """The prompt's own blocks are shared both ways, what follows is not."""
    llm.reset_prefix_cache()
    [(tokens, _)] = generate(llm, [PROMPT], [sampling(40, REROUTE)])
    text = PROMPT + tokens
    shared = {"reroute": {**REROUTE["reroute"], "lr": 0.4}}
    after = [
        complete_with_hits(llm, text, request) for request in (None, shared, REROUTE)
    ]
    # of 60 prompt tokens, one block of 32 ends before the last; the plain request
    # then leaves all of its own
    assert [hits for _, hits in after] == [32, 64, 64]
    llm.reset_prefix_cache()
    fresh = []
    for request in (None, shared, REROUTE):
        llm.reset_prefix_cache()
        fresh.append(complete_with_hits(llm, text, request)[0])
    assert [tokens for tokens, _ in after] == fresh


def complete_with_hits(llm, prompt, request):
    prompt = prompt[:96]
    [output] = llm.generate(
        [{"prompt_token_ids": prompt}], sampling(8, request), use_tqdm=False
    )
    return outputs(output), output.num_cached_tokens


def test_a_waiting_request_lets_others_pass(llm, monkeypatch):
    """A prompt of one token has no row that may be computed before its round."""
    scheduler = scheduler_of(llm)
    monkeypatch.setattr(scheduler.rounds, "_budget", 1)
    core = llm.llm_engine
    slow = {"reroute": {"every": 0, "steps": 40}}
    core.add_request("slow", {"prompt_token_ids": [5]}, sampling(2, slow))
    core.add_request("fast", {"prompt_token_ids": PROMPT}, sampling(6))
    ended = []
    while core.has_unfinished_requests():
        ended += [o.request_id for o in core.step() if o.finished]
    assert ended == ["fast", "slow"]


def test_an_abort_drops_the_job(llm, monkeypatch):
    scheduler = scheduler_of(llm)
    monkeypatch.setattr(scheduler.rounds, "_budget", 130)  # the step, no last loss
    core = llm.llm_engine
    core.add_request("gone", {"prompt_token_ids": PROMPT}, sampling(20, REROUTE))
    core.add_request("stays", {"prompt_token_ids": PROMPT[:9]}, sampling(30))
    core.step()
    assert status(llm)["jobs"] == 1
    core.abort_request(["gone"])
    core.step()
    assert status(llm)["jobs"] == 0
    while core.has_unfinished_requests():
        core.step()
    check_empty(llm)
