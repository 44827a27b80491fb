# SPDX-License-Identifier: Apache-2.0
"""Rerouting end to end: vLLM equals the plain loop of adapter and transformers."""

import random

import pytest

from moe_tta.vllm_plugin.reroute_service import RerouteService
from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.reroute_reference import Loop

TOKENS = 26
EXACT = {"dtype": "float32", "max_model_len": 192, "block_size": 32}
ADAPTER = {"additional_config": {"moe_tta": {"adapter": {"budget": 500}, "k_max": 4}}}
REQUESTS = {
    "defaults": {"reroute": {"every": 8}},
    "once": {"reroute": {"every": 0, "steps": 3, "lr": 0.3}},
    "soft": {"reroute": {"every": 8, "choice": "soft", "steps": 2, "lr": 0.2}},
    "layers": {"reroute": {"every": 16, "layers": [1, 2], "lr": 0.2, "clip": 0.3}},
    "sgd": {"reroute": {"every": 8, "optimizer": "sgd", "lr": 5.0, "skip": 4}},
    # one round: rounding, of losses 20 times, moves a later one over a tie of experts
    "spsa": {"reroute": {"every": 0, "optimizer": "spsa", "steps": 3, "lr": 2.0}},
    "plans": {
        "steer": {"bias": [[0, 1, 1.5], [2, 3, -1]], "span": "generated"},
        "dynamic_k": {"k": 3, "span": "all"},
        "reroute": {"every": 8, "sign": -1, "lr": 0.2},
    },
}


def draw_prompts(count, rng):
    return [
        [rng.randrange(2, 256) for _ in range(rng.randrange(4, 60))]
        for _ in range(count)
    ]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def llm(tiny_models):
    with engine(tiny_models("mixtral"), **EXACT, **ADAPTER) as llm:
        yield llm


@pytest.fixture(scope="module")
def loop(llm, tiny_models):
    shape = llm.llm_engine.input_processor.moe_tta.shape
    return Loop(tiny_models("mixtral"), shape)


@pytest.mark.parametrize("name", REQUESTS)
def test_tokens_equal_the_plain_loop(llm, loop, name):
    prompts = draw_prompts(4, random.Random(3))
    params = [sampling(TOKENS, REQUESTS[name])] * len(prompts)
    got = generate(llm, prompts, params)
    for prompt, (tokens, _) in zip(prompts, got, strict=True):
        want, _ = loop.generate(REQUESTS[name], prompt, TOKENS)
        assert tokens == want, len(prompt)


def test_batched_rounds_equal_the_plain_loop(llm, loop, monkeypatch):
    """Two jobs of several texts: padding moves roundings, and no more than these."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler.rounds, "_batch_tokens", 200)
    begun, begin = [], RerouteService.begin

    def counted(self, texts, arguments):
        begun.append(len(texts))
        return begin(self, texts, arguments)

    monkeypatch.setattr(RerouteService, "begin", counted)
    prompts = draw_prompts(4, random.Random(3))
    names = ["defaults", "defaults", "once", "once"]
    params = [sampling(TOKENS, REQUESTS[name]) for name in names]
    got = generate(llm, prompts, params)
    assert begun.count(2) >= 2
    for name, prompt, (tokens, _) in zip(names, prompts, got, strict=True):
        want, _ = loop.generate(REQUESTS[name], prompt, TOKENS)
        assert tokens == want


def test_it_does_change_texts(llm):
    prompts = draw_prompts(4, random.Random(3))
    plain = generate(llm, prompts, [sampling(TOKENS)] * 4)
    adapted = generate(llm, prompts, [sampling(TOKENS, REQUESTS["once"])] * 4)
    assert all(a[0] != b[0] for a, b in zip(adapted, plain, strict=True))


def test_rate_zero_is_the_model_bit_for_bit(llm):
    prompts = draw_prompts(8, random.Random(4))
    plain = generate(llm, prompts, [sampling(TOKENS)] * 8)
    for reroute in ({"every": 8}, {"every": 0}, {"every": 8, "mode": "overlap"}):
        request = {"reroute": {**reroute, "lr": 0.0, "steps": 2}}
        assert generate(llm, prompts, [sampling(TOKENS, request)] * 8) == plain
    steer = {"steer": {"promote": [[1, 0]]}}
    steered = generate(llm, prompts, [sampling(TOKENS, steer)] * 8)
    both = {**steer, "reroute": {"every": 8, "lr": 0.0, "steps": 1}}
    assert generate(llm, prompts, [sampling(TOKENS, both)] * 8) == steered
    assert steered != plain


def test_shortest_prompts(llm, loop):
    """One token has nothing to score, two have one row before their version."""
    request = {"reroute": {"every": 8, "steps": 2, "lr": 0.3}}
    one, two = llm.generate(
        [{"prompt_token_ids": [7]}, {"prompt_token_ids": [7, 9]}],
        sampling(12, request),
        use_tqdm=False,
    )
    rounds = one.outputs[0].moe_tta["rounds"]
    assert [r["outcome"] for r in rounds] == ["no token to score", "adapted"]
    assert [r["context"] for r in rounds] == [1, 9]
    assert outputs(two)[0] == loop.generate(request, [7, 9], 12)[0]


def test_reports(llm, loop):
    prompt = draw_prompts(1, random.Random(6))[0]
    request = {"reroute": {"every": 8, "steps": 2, "layers": [1, 3]}}
    [output] = llm.generate(
        [{"prompt_token_ids": prompt}], sampling(20, request), use_tqdm=False
    )
    rounds = output.outputs[0].moe_tta["rounds"]
    assert output.kv_transfer_params is None
    contexts = [len(prompt), len(prompt) + 8, len(prompt) + 16]
    assert [r["round"] for r in rounds] == [0, 1, 2]
    assert [r["context"] for r in rounds] == contexts
    assert [r["start"] for r in rounds] == [c - 1 for c in contexts]
    for report in rounds:
        assert report["outcome"] == "adapted"
        assert report["layers"] == [1, 3]
        assert len(report["losses"]) == 3
        assert report["milliseconds"] > 0
    [plain] = llm.generate([{"prompt_token_ids": prompt}], sampling(2), use_tqdm=False)
    assert plain.outputs[0].moe_tta is None
    held = status(llm)
    assert (held["jobs"], held["requests_with_plan"], held["slots_in_use"]) == (0,) * 3


def test_scored_in_the_prompt_as_generated(llm):
    """With `prompt_tokens`, rounds fall inside what vLLM takes for the prompt."""
    prompt = draw_prompts(1, random.Random(9))[0]
    request = {"reroute": {"every": 8, "steps": 2, "lr": 0.3}}
    [(tokens, logprobs)] = generate(llm, [prompt], [sampling(20, request)])
    scored = {**request, "prompt_tokens": len(prompt)}
    [output] = llm.generate(
        [{"prompt_token_ids": prompt + tokens}],
        sampling(1, scored, prompt_logprobs=0),
        use_tqdm=False,
    )
    rows = output.prompt_logprobs[len(prompt) :]
    found = [row[token].logprob for row, token in zip(rows, tokens, strict=True)]
    assert found == logprobs
    assert len(output.outputs[0].moe_tta["rounds"]) == 3


def test_each_of_n_completions_adapts_to_itself(llm):
    """In one process they share their parameters; top_k 1 is greedy again."""
    prompt, request = draw_prompts(1, random.Random(7))[0], REQUESTS["once"]
    twice = {"n": 2, "temperature": 1.0, "top_k": 1}
    [output] = llm.generate(
        [{"prompt_token_ids": prompt}],
        sampling(TOKENS, request, **twice),
        use_tqdm=False,
    )
    [(alone, _)] = generate(llm, [prompt], [sampling(TOKENS, request)])
    assert [list(c.token_ids) for c in output.outputs] == [alone, alone]
    assert all(len(c.moe_tta["rounds"]) == 1 for c in output.outputs)


def test_overlap_is_replayed_by_its_report(llm, loop, monkeypatch):
    """A budget below a round a step lets rows go ahead under the old version."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    monkeypatch.setattr(scheduler.rounds, "_budget", 40)
    prompts = draw_prompts(3, random.Random(12))
    asked = {"every": 8, "steps": 2, "lr": 0.3}
    request = {"reroute": {**asked, "mode": "overlap"}}
    recorded = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling(TOKENS, request),
        use_tqdm=False,
    )
    late = 0
    for prompt, output in zip(prompts, recorded, strict=True):
        rounds = output.outputs[0].moe_tta["rounds"]
        pairs = [[r["context"], r["start"]] for r in rounds]
        late += sum(start >= context for context, start in pairs)
        replay = {"reroute": {"steps": 2, "lr": 0.3, "replay": pairs}}
        [again] = generate(llm, [prompt], [sampling(TOKENS, replay)])
        assert again == outputs(output)
        wanted = {"reroute": asked}
        starts = [start for _, start in pairs] + [10**6] * 4
        assert again[0] == loop.generate(wanted, prompt, TOKENS, starts)[0]
    assert late > 4
