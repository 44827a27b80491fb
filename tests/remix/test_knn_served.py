# SPDX-License-Identifier: Apache-2.0
"""knn in real vLLM: rows recall what the law says, and no other row anything."""

import os
import random

import numpy as np
import pytest
import torch
from vllm.exceptions import VLLMValidationError

from moe_tta.adapter.assignments import TokenDescent
from moe_tta.compile import compile_request
from moe_tta.kernels.recall import recall_rows
from moe_tta.kernels.reference import RoutingRule, model_routing, route
from moe_tta.kernels.table import PlanTable
from moe_tta.plan import RoutingPlan
from moe_tta.spec import parse
from moe_tta.vllm_plugin.memories import Memories
from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.spying import runners, spied
from tests.plugin.stock import run_stock
from tests.plugin.test_isolation import counters
from tests.plugin.test_replica import replica_errors
from tests.remix.making import made_store
from tests.remix.tokens import (
    encode,
    made_tokens,
    random_layers,
    reference_model,
    write_labelled,
)

TEXTS = [
    ("the sky over the harbour is", "blue"),
    ("one two three four", "five"),
    ("a river runs to the", "sea"),
    ("bread is made of", "flour"),
]
PROMPTS = [encode(prompt) for prompt, _ in TEXTS]
EXACT = {"dtype": "float32", "max_model_len": 256, "block_size": 32}
# chunks of 16 tokens, and too few blocks for all requests at once
CROWDED = {
    "max_num_seqs": 8,
    "max_num_batched_tokens": 16,
    "enable_chunked_prefill": True,
    "num_gpu_blocks_override": 12,
}


def asking(store="learned", **member):
    return {"knn": {"store": store, **member}}


@pytest.fixture(scope="module")
def folder(tiny_models):
    return tiny_models("mixtral")


@pytest.fixture(scope="module")
def stores(folder, tmp_path_factory):
    """Folders by name: token stores that serve, and stores that do not."""
    from moe_tta.remix.tokens_build import TokenOptions, build_tokens

    where, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(0)
    data, model = write_labelled(where / "data", TEXTS), reference_model(folder)
    learned = TokenDescent(steps=4, lr=0.5)
    for name, descent in (("learned", learned), ("own", TokenDescent(steps=0))):
        options = TokenOptions(scored="text", descent=descent)
        build_tokens(model, data, where / name, options)

    def made(name, card=model.card, tokens=30, **options):
        layers = random_layers(rng, card, tokens, 128, **options)
        return made_tokens(where / name, card, layers).path

    made("random", layers=[1, 3])
    made("foreign", model.card.model_copy(update={"weights": "ff"}))
    made("big", tokens=300)  # 1.2 MiB
    os.truncate(made("short") / "layer-00002.safetensors", 99)
    damaged = made("corrupt") / "layer-00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[::-1])
    pathways = rng.dirichlet(np.ones(8), (1, 4))
    asked = made_store(where / "asked", np.eye(1, 8), pathways, model.card)
    names = ("learned", "own", "random", "foreign", "big", "short", "corrupt")
    found = {name: str(where / name) for name in names}
    return {"asked": str(asked.path), **found, "missing": str(where / "nothing")}


@pytest.fixture(scope="module")
def llm(folder, stores):
    settings = {"stores": stores, "max_store_mib": 1, "k_max": 4}
    options = {**EXACT, **CROWDED, "additional_config": {"moe_tta": settings}}
    with engine(folder, **options) as llm:
        yield llm


@pytest.fixture(autouse=True)
def _empty_cache(llm):
    llm.reset_prefix_cache()


@pytest.fixture(scope="module")
def admission(llm):
    return llm.llm_engine.input_processor.moe_tta


@pytest.fixture(scope="module")
def memories(llm):
    """Each layer's memories by place, as the worker holds them."""
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    held: Memories = worker.model_runner.moe_tta.memories
    return [held.layer(index) for index in range(4)]


REQUESTS = [
    asking(),
    asking(k=1),
    asking("own", k=3, span="generated"),
    asking("random", k=30, layers=[3, 3]),
    asking(span="last_prompt+generated", layers=[0, 2]),
    {**asking(), "dynamic_k": {"k": 4}, "renorm": "always"},
    {**asking(), "steer": {"bias": [[0, 1, 2.0]], "demote": [[2, 3]]}},
]


@pytest.mark.parametrize("request_", REQUESTS, ids=str)
def test_every_row_is_routed_by_the_law(llm, admission, memories, request_):
    """To the bit, from what the engine's own routers were given."""
    prompt = PROMPTS[0]
    with spied(llm) as calls:
        generate(llm, [prompt], [sampling(4, request_)])
    shape = admission.shape
    plans = compile_request(parse(request_, presets={}), admission.context).plans
    table = PlanTable(shape, 3, "cpu")
    table.write(dict(enumerate((p or RoutingPlan() for p in plans), start=1)))
    rule = RoutingRule.from_shape(shape)
    ends, changed = dict.fromkeys(range(4), 0), 0
    for call in calls:
        rows = torch.arange(len(call.logits)) + ends[call.layer]
        ends[call.layer] += len(rows)
        slots = 1 + (rows >= len(prompt) - 1).int() + (rows >= len(prompt)).int()
        layer = table.layer(call.layer)
        found = recall_rows(call.hidden, slots, layer, memories[call.layer])
        want = route(
            *(call.logits, slots, rows, layer, rule, 4, call.layer), recalled=found
        )
        assert torch.equal(call.ids, want.topk_ids.to(call.ids.dtype))
        unplanned = torch.tensor([plans[slot - 1] is None for slot in slots])
        assert torch.equal(call.weights[~unplanned], want.topk_weights[~unplanned])
        own = model_routing(call.logits, rule, 4)
        changed += int((own.topk_weights != want.topk_weights).any(dim=1).sum())
    assert set(ends.values()) == {len(prompt) + 3}
    assert changed


def test_served_equals_the_replica(llm, admission, folder, memories):
    """float32: as near to float64 as transformers' own float32, and the same tokens."""
    prompts = [PROMPTS[i % 4] for i in range(len(REQUESTS))]
    results = generate(llm, prompts, [sampling(8, r) for r in REQUESTS])
    runs = list(zip(prompts, REQUESTS, results, strict=True))
    stores = {"stores": admission.context.stores, "memories": memories}
    own, theirs = replica_errors(folder, torch.float32, admission.shape, runs, **stores)
    # one rounding of logits up to 16
    assert max(theirs) <= 2 * max(own) + 16 * torch.finfo(torch.float32).eps
    assert all(value > -20 for _, _, (_, values) in runs for value in values)


def test_company_changes_nothing_and_gets_nothing(llm, folder, tmp_path):
    before = counters(llm)["vllm:num_preemptions"]
    rng = random.Random(3)
    requests = [None, *REQUESTS[:4], {"dynamic_k": {"k": 1}}, None, asking("own")] * 2
    prompts = [
        PROMPTS[i % 4] + [rng.randrange(2, 250) for _ in range(rng.randrange(20))]
        for i in range(len(requests))
    ]
    crowd = generate(llm, prompts, [sampling(24, request) for request in requests])
    assert counters(llm)["vllm:num_preemptions"] > before
    for prompt, request, got in list(zip(prompts, requests, crowd, strict=True))[:8]:
        llm.reset_prefix_cache()
        assert generate(llm, [prompt], [sampling(24, request)]) == [got]
    plain = [i for i, request in enumerate(requests) if request is None]
    options = {"temperature": 0.0, "logprobs": 0, "ignore_eos": True}
    stock = run_stock(
        folder,
        [prompts[i] for i in plain],
        {"tokens": 24, **options},
        tmp_path,
        {**EXACT, **CROWDED},
    )
    assert stock == [crowd[i] for i in plain]
    generate(llm, [[5, 6]], [sampling(1)])  # the last ones are known to be done now
    assert status(llm)["slots_in_use"] == 0


def test_the_routers_own_assignments_of_the_same_text_are_base(llm):
    """A row whose key is stored, with the router's assignment, is routed as ever."""
    ((tokens, plain),) = generate(llm, [PROMPTS[0]], [sampling(4)])
    request = asking("own", k=1, span="prompt")
    ((again, same),) = generate(llm, [PROMPTS[0]], [sampling(4, request)])
    assert again == tokens
    np.testing.assert_allclose(same, plain, atol=1e-4)
    ((_, other),) = generate(llm, [PROMPTS[0]], [sampling(4, asking(k=1))])
    assert max(abs(np.subtract(other, plain))) > 1e-3


def test_prefix_cache_is_told_apart_by_store_and_k(llm):
    prompt = PROMPTS[0] + PROMPTS[1]

    def cached(request):
        params = sampling(1, request)
        (done,) = llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return done.num_cached_tokens, outputs(done)

    cold = [cached(r) for r in (None, asking(), asking("own"), asking(k=3))]
    assert [count for count, _ in cold] == [0] * 4
    warm = [cached(r) for r in (None, asking(), asking("own"), asking(k=3))]
    assert [count for count, _ in warm] == [32] * 4
    assert [out for _, out in warm] == [out for _, out in cold]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("foreign", r"made for tiny, not for this model: weights ff != "),
        ("short", "99 bytes, the card says"),
        ("corrupt", "sha256 is .* damaged or changed"),
        ("big", "takes 1 MiB of memory, more than max_store_mib, 1"),
        ("missing", "card.json: cannot be read: No such file"),
        (
            "asked",
            "expected a store of tokens, got one of questions: that is for remix",
        ),
        ("other", "unknown store .* known: asked, big, corrupt, foreign, learned"),
    ],
)
def test_stores_that_cannot_be_used_leave_the_server_up(llm, name, words):
    with pytest.raises(VLLMValidationError, match=words) as caught:
        generate(llm, [PROMPTS[0]], [sampling(1, asking(name))])
    assert caught.value.parameter == "moe_tta.knn.store"
    ((tokens, _),) = generate(llm, [PROMPTS[0]], [sampling(2)])
    assert len(tokens) == 2
    assert status(llm)["token_stores"] == 3


def test_a_token_store_is_none_of_questions(llm):
    with pytest.raises(VLLMValidationError, match="one of tokens: that is for knn"):
        generate(llm, [PROMPTS[0]], [sampling(1, {"remix": {"store": "own"}})])


def test_engines_without_token_stores_hand_no_hidden_states(folder, stores):
    settings = {"stores": {"asked": stores["asked"]}}
    with engine(folder, **EXACT, additional_config={"moe_tta": settings}) as llm:
        assert status(llm)["token_stores"] == 0
        assert all(not runner.router.moe_tta.memories for runner in runners(llm))
