# SPDX-License-Identifier: Apache-2.0
"""remix in real vLLM: the rows it says and no others, whatever the engine does."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig
from vllm.exceptions import VLLMValidationError

from moe_tta.remix.card import ModelCard
from moe_tta.remix.checkpoint import weights_hash
from moe_tta.remix.store import shard_file
from moe_tta.vllm_plugin.model_shape import shape_from_config
from moe_tta.vllm_plugin.remix_engine import record_pathways
from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.spying import spied
from tests.plugin.test_isolation import counters
from tests.remix.making import DIM, made_store

PROMPT = list(range(20, 71))
LAST = len(PROMPT) - 1
EXACT = {"dtype": "float32", "max_model_len": 256, "block_size": 32}
# chunks of 16 tokens, and too few blocks for all requests at once
CROWDED = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "enable_chunked_prefill": True,
    "num_gpu_blocks_override": 12,
}
AWAY = [-1.0] + [0.0] * (DIM - 1)
NEAR = [1.0] + [0.0] * (DIM - 1)


def asking(**member):
    return {"remix": {"store": "one", "vector": NEAR, **member}}


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("mixtral")


@pytest.fixture(scope="module")
def pathway():
    """The one neighbour's: [L, E] float32."""
    rng = np.random.default_rng(0)
    return rng.dirichlet(np.ones(8), 4).astype(np.float32)


@pytest.fixture(scope="module")
def stores(folder, pathway, tmp_path_factory):
    """A store of one neighbour, and stores that cannot be used."""
    shape = shape_from_config(AutoConfig.from_pretrained(folder))
    weights = weights_hash(Path(folder))
    model = ModelCard.of(shape, name="tiny", weights=weights, dtype="float32")
    other = model.model_copy(update={"weights": "ff", "dtype": "bfloat16"})
    states, where = np.eye(1, DIM), tmp_path_factory.mktemp("stores")
    made = {
        "one": made_store(where / "one", states, pathway[None], model),
        "foreign": made_store(where / "foreign", states, pathway[None], other),
        "short": made_store(where / "short", states, pathway[None], model),
        "corrupt": made_store(where / "corrupt", states, pathway[None], model),
    }
    os.truncate(made["short"].path / shard_file(0), 99)
    damaged = made["corrupt"].path / "index.faiss"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    paths = {name: str(store.path) for name, store in made.items()}
    return {**paths, "missing": str(where / "nothing")}


@pytest.fixture(scope="module")
def llm(folder, stores, tmp_path_factory):
    traces = tmp_path_factory.mktemp("traces")
    settings = {"stores": stores, "allow_inline": True, "trace_dir": str(traces)}
    options = {**EXACT, **CROWDED, "additional_config": {"moe_tta": settings}}
    with engine(folder, **options) as llm:
        llm.traces = traces
        yield llm


@pytest.fixture(autouse=True)
def _empty_cache(llm):
    llm.reset_prefix_cache()


def expected(pathway):
    """Return ids and weights [L, 2]: the neighbour's best two, scaled to sum 1."""
    ids = np.argsort(-pathway, axis=1, kind="stable")[:, :2]
    weights = torch.from_numpy(np.take_along_axis(pathway, ids, axis=1))
    return ids, (weights / weights.sum(dim=1, keepdim=True)).numpy()


def run(llm, requests, prompt=PROMPT, tokens=4, **options):
    """Generate in one batch; returns outputs and traces, in the requests' order."""
    params = [sampling(tokens, request, **options) for request in requests]
    inputs = [{"prompt_token_ids": prompt}] * len(requests)
    results = llm.generate(inputs, params, use_tqdm=False)
    generate(llm, [[5, 6]], [sampling(1)])  # the last traces are written now
    traces = []
    for result in results:
        (path,) = llm.traces.glob(f"{result.request_id}-*.safetensors")
        traces.append(load_file(path))
    return results, traces


def check_rows(trace, changed, pathway):
    """The rows at the positions `changed` are the neighbour's, all others stock."""
    ids, weights = expected(pathway)
    ours = np.isin(trace["positions"], changed)
    count = ours.sum()
    assert count >= len(changed)
    np.testing.assert_array_equal(trace["topk_ids"][ours], ids[None].repeat(count, 0))
    got = trace["topk_weights"][ours]
    np.testing.assert_array_equal(got, weights[None].repeat(count, 0))
    stock = trace["stock_ids"][~ours]
    np.testing.assert_array_equal(trace["topk_ids"][~ours], stock)


def test_one_neighbour_at_the_last_prompt_row_and_nowhere_else(llm, pathway):
    _, (trace,) = run(llm, [asking(layers=[0, 3])])
    assert np.array_equal(trace["positions"], np.arange(LAST + 4))
    check_rows(trace, [LAST], pathway)
    stock = trace["stock_ids"][LAST]
    assert (trace["topk_ids"][LAST] != stock).any(axis=1).sum() >= 2


def test_all_other_rows_are_stock_to_the_bit(llm, pathway):
    def calls(request):
        llm.reset_prefix_cache()
        with spied(llm) as noted:
            generate(llm, [PROMPT], [sampling(1, request)])
        layers = {}
        for call in noted:
            layers.setdefault(call.layer, []).append(call)
        return [
            (
                torch.cat([c.ids for c in layers[n]]),
                torch.cat([c.weights for c in layers[n]]),
            )
            for n in sorted(layers)
        ]

    ids, weights = expected(pathway)
    plain, remixed = calls(None), calls(asking(layers=[0, 3]))
    for place, (before, after) in enumerate(zip(plain, remixed, strict=True)):
        assert len(before[0]) == len(PROMPT)
        # no earlier row attends to the last one: even their weights stay, bit for bit
        assert torch.equal(before[0][:LAST], after[0][:LAST])
        assert torch.equal(before[1][:LAST], after[1][:LAST])
        assert after[0][LAST].tolist() == ids[place].tolist()
        assert after[1][LAST].tolist() == weights[place].tolist()


def test_preemption_and_company_change_nothing(llm, pathway):
    before = counters(llm)["vllm:num_preemptions"]
    layers = {"layers": [0, 3]}
    requests = [
        asking(**layers),
        None,
        asking(**layers, span="last_prompt+generated"),
        {"dynamic_k": {"k": 1}},
    ] * 3
    crowd, traces = run(llm, requests, tokens=60)
    assert counters(llm)["vllm:num_preemptions"] > before
    twice = [(t["positions"] == LAST).sum() > 1 for t in traces]
    assert any(twice[0::4])
    for index in range(0, 12, 4):
        check_rows(traces[index], [LAST], pathway)
        check_rows(traces[index + 1], [], pathway)
        generated = np.arange(LAST, LAST + 60)
        check_rows(traces[index + 2], generated, pathway)
    for index in range(4):
        llm.reset_prefix_cache()
        ((alone,), _) = run(llm, [requests[index]], tokens=60)
        assert outputs(crowd[index]) == outputs(alone)
        assert outputs(crowd[index + 8]) == outputs(alone)
    assert status(llm)["slots_in_use"] == 0


def test_without_a_near_neighbour_a_request_is_base(llm):
    far = asking(vector=AWAY)
    ((plain,), _) = run(llm, [None])
    ((warm,), _) = run(llm, [far])
    assert warm.num_cached_tokens == 32  # the stock prefix cache is shared
    llm.reset_prefix_cache()
    ((cold,), (trace,)) = run(llm, [far])
    assert outputs(cold) == outputs(warm) == outputs(plain)
    np.testing.assert_array_equal(trace["topk_ids"], trace["stock_ids"])
    ((near,), _) = run(llm, [asking(layers=[0, 3])])
    assert near.num_cached_tokens == 0


def test_a_given_distribution_is_served(llm, pathway):
    given = {str(layer): row.tolist() for layer, row in enumerate(pathway)}
    _, (trace,) = run(llm, [{"remix": {"distribution": given}}])
    check_rows(trace, [LAST], pathway)


def test_a_question_inside_the_prompt(llm, pathway):
    """Scoring an answer in the prompt equals generating it."""
    request = asking(layers=[0, 3])
    ((asked,), _) = run(llm, [request], tokens=6)
    answer, logprobs = outputs(asked)
    scored = {**request, "prompt_tokens": len(PROMPT)}
    llm.reset_prefix_cache()
    whole = PROMPT + answer
    (results, (trace,)) = run(llm, [scored], whole, tokens=1, prompt_logprobs=0)
    check_rows(trace, [LAST], pathway)
    steps = results[0].prompt_logprobs[len(PROMPT) :]
    got = [step[token].logprob for step, token in zip(steps, answer, strict=True)]
    assert got == logprobs
    ((plain,), _) = run(llm, [None], whole, tokens=1, prompt_logprobs=0)
    steps = plain.prompt_logprobs[len(PROMPT) :]
    own = [step[token].logprob for step, token in zip(steps, answer, strict=True)]
    assert got != own


@pytest.mark.parametrize("tokens", [0, len(PROMPT) + 1])
def test_prompt_tokens_must_lie_in_the_prompt(llm, tokens):
    with pytest.raises(VLLMValidationError) as caught:
        run(llm, [asking(layers=[0, 3]) | {"prompt_tokens": tokens}])
    assert caught.value.parameter == "moe_tta.prompt_tokens"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("foreign", r"made for tiny, not for this model: weights ff != .*; dtype bf"),
        ("short", "99 bytes, the card says"),
        ("corrupt", "sha256 is .* damaged or changed"),
        ("missing", "card.json: cannot be read: No such file"),
        ("other", "unknown store .* known: corrupt, foreign, missing, one, short"),
    ],
)
def test_stores_that_cannot_be_used_leave_the_server_up(llm, name, words):
    words = words.replace("dtype bf", "dtype bfloat16 != float32")
    with pytest.raises(VLLMValidationError, match=words) as caught:
        run(llm, [asking(store=name)])
    assert caught.value.parameter == "moe_tta.remix.store"
    results, _ = run(llm, [None])
    assert len(results[0].outputs[0].token_ids) == 4


def test_recorded_pathways_are_the_routers_own(llm, folder):
    rng = random.Random(1)
    prompts = [[rng.randrange(2, 256) for _ in range(n)] for n in (3, 40, 17)]
    recorded = record_pathways(llm, prompts)
    head = load_file(f"{folder}/model.safetensors")["lm_head.weight"].astype(float)
    for index, prompt in enumerate(prompts):
        llm.reset_prefix_cache()
        with spied(llm) as calls:
            ((tokens, logprobs),) = generate(llm, [prompt], [sampling(1)])
        last = {call.layer: call.logits[-1] for call in calls}
        want = torch.stack([torch.softmax(last[n].float(), 0) for n in sorted(last)])
        np.testing.assert_array_equal(recorded.pathways[index], want.numpy())
        logits = head @ recorded.hidden_last[index].astype(float)
        shares = np.exp(logits - logits.max())
        got = np.log(shares[tokens[0]] / shares.sum())
        # float32 sums of 128 products each
        bound = 128 * 2.0**-23 * np.abs(head * recorded.hidden_last[index]).sum(1).max()
        np.testing.assert_allclose(got, logprobs[0], atol=bound)
    short = record_pathways(llm, [prompts[0][:1]])
    np.testing.assert_allclose(short.hidden_mean, short.hidden_last, rtol=1e-6)
