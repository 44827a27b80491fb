# SPDX-License-Identifier: Apache-2.0
"""remix's searches on the neighbours' loss, served: as the adapter finds them alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoTokenizer
from vllm.exceptions import VLLMValidationError

from moe_tta.adapter import (
    AdapterModel,
    GradientDescent,
    Neighbour,
    NeighbourTail,
    descend_neighbours,
    last_row_routing,
    search_alpha,
)
from moe_tta.remix.card import ModelCard
from moe_tta.remix.checkpoint import weights_hash
from moe_tta.remix.lookup import LookUp, find_neighbours, read_pathways
from moe_tta.remix.updates import regress
from moe_tta.vllm_plugin.model_shape import shape_from_config
from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.remix.making import DIM, made_store

TOKENS = 5
LAST_FIVE = slice(-5, None)
NEAR = [0.9, 0.5, 0.3] + [0.0] * (DIM - 3)
AWAY = [0.0] * (DIM - 1) + [1.0]
DESCENT = {"update": "ngd", "lr": 20.0, "lr_end": 1.0, "steps": 6}


def asking(**member):
    return {"remix": {"store": "three", "vector": NEAR, **member}}


@pytest.fixture(scope="module")
def folder(lab):
    return lab("olmoe-fine")


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    shape = shape_from_config(AutoConfig.from_pretrained(folder))
    card = ModelCard.of(
        shape, name="lab", weights=weights_hash(Path(folder)), dtype="float32"
    )
    pathways = np.random.default_rng(1).dirichlet(
        np.ones(shape.num_experts) / 4, (3, len(shape.layers))
    )
    where = tmp_path_factory.mktemp("searched")
    return made_store(where, np.eye(3, DIM), pathways, card)


@pytest.fixture(scope="module")
def llm(folder, store, tmp_path_factory):
    traces = tmp_path_factory.mktemp("traces")
    settings = {
        "stores": {"three": str(store.path)},
        "allow_inline": True,
        "adapter": {"max_context": 64},
        "trace_dir": str(traces),
    }
    options = {
        "dtype": "float32",
        "max_model_len": 128,
        "block_size": 32,
        "max_num_batched_tokens": 32,
        "skip_tokenizer_init": False,
        "additional_config": {"moe_tta": settings},
    }
    with engine(folder, **options) as llm:
        llm.traces = traces
        yield llm


@pytest.fixture(scope="module")
def prompt(folder):
    text = "Once upon a time there was a fox who looked at the moon, and it said: I am"
    return AutoTokenizer.from_pretrained(folder).encode(text)


@pytest.fixture(scope="module")
def alone(folder, store, prompt):
    """What the adapter finds, without an engine: the tail, own and borrowed routing."""
    model = AdapterModel.from_checkpoint(folder, torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    unit = np.array(NEAR, np.float32) / np.linalg.norm(NEAR)
    layers = list(model.shape.layers[LAST_FIVE])
    found = find_neighbours(store, unit, LookUp())
    found = read_pathways(store, found, layers)
    weights = found.weights / found.weights.sum()
    neighbours = []
    for row, weight in zip(found.rows.tolist(), weights.tolist(), strict=True):
        asked = tokenizer.encode(f"q{row}")
        whole = tokenizer.encode(f"q{row} right {row}")
        assert whole[: len(asked)] == asked
        neighbours.append(Neighbour(asked, whole[len(asked) :], weight))
    tail = NeighbourTail(model, neighbours, layers)
    own = last_row_routing(model, [prompt])[:, LAST_FIVE]
    return tail, own, torch.from_numpy(regress(found))[None]


def run(llm, requests, prompt):
    llm.reset_prefix_cache()
    inputs = [{"prompt_token_ids": prompt}] * len(requests)
    params = [sampling(TOKENS, request) for request in requests]
    return llm.generate(inputs, params, use_tqdm=False)


def trace_of(llm, result):
    generate(llm, [[5, 6]], [sampling(1)])  # the last traces are written now
    (path,) = llm.traces.glob(f"{result.request_id}-*.safetensors")
    return load_file(path)


def given(tail, omega):
    """The same distribution, found elsewhere and sent with the request."""
    rows = omega[0].tolist()  # unscaled, so that not a bit is lost
    pairs = zip(tail.layers, rows, strict=True)
    return {"remix": {"distribution": {str(layer): row for layer, row in pairs}}}


def test_descent_is_the_adapters_own(llm, prompt, alone):
    tail, own, _ = alone
    settings = GradientDescent(steps=6, lr=20.0, lr_end=1.0)
    want = descend_neighbours(tail, own, settings)
    assert want.losses[0, -1] < want.losses[0, 0] - 0.1
    served, sent, plain = run(
        llm, [asking(**DESCENT), given(tail, want.omega), None], prompt
    )
    assert outputs(served) == outputs(sent) != outputs(plain)
    (report,) = served.outputs[0].moe_tta["rounds"]
    assert report["outcome"] == "adapted"
    assert (report["context"], report["start"]) == (len(prompt), len(prompt) - 1)
    assert report["layers"] == list(tail.layers)
    np.testing.assert_allclose(report["losses"], want.losses[0].numpy(), atol=1e-6)


def test_descent_changes_the_last_prompt_row_alone(llm, prompt, alone):
    (served,) = run(llm, [asking(**DESCENT)], prompt)
    trace = trace_of(llm, served)
    # the law and vLLM's own selection list a row's experts in different orders
    ours, stock = (np.sort(trace[name]) for name in ("topk_ids", "stock_ids"))
    changed = (ours != stock).any(axis=2)
    assert trace["positions"].tolist() == list(range(len(prompt) + TOKENS - 1))
    assert np.flatnonzero(changed.any(axis=1)).tolist() == [len(prompt) - 1]
    assert not changed[len(prompt) - 1, :-5].any()


def test_line_search_is_the_adapters_own(llm, prompt, alone):
    tail, own, borrowed = alone
    want = search_alpha(tail, own, borrowed)
    assert 0 < want.alpha[0] < 1  # neither end is the best: a search was needed
    request = asking(update="search_alpha")
    served, sent, plain = run(llm, [request, given(tail, want.omega), None], prompt)
    assert outputs(served) == outputs(sent) != outputs(plain)
    (report,) = served.outputs[0].moe_tta["rounds"]
    assert report["alpha"] == want.alpha[0]


def test_crowd_and_spans(llm, prompt, alone):
    """Chunks of 32 tokens, and company, change nothing; all is gone at the end."""
    requests = [
        asking(**DESCENT),
        asking(**DESCENT, span="last_prompt+generated"),
        asking(update="search_alpha"),
        {"dynamic_k": {"k": 2}} | asking(**DESCENT, layers=[1, 3]),
        None,
    ]
    crowd = [outputs(result) for result in run(llm, requests * 2, prompt)]
    assert crowd[:5] == crowd[5:]
    assert len({tuple(tokens) for tokens, _ in crowd}) > 2
    for request, found in zip(requests, crowd[:5], strict=True):
        (result,) = run(llm, [request], prompt)
        assert outputs(result) == found
    held = status(llm)
    assert held["slots_in_use"] == held["jobs"] == held["requests_with_plan"] == 0


def test_without_a_near_neighbour_a_request_is_base(llm, prompt):
    far = asking(**DESCENT) | {}
    far["remix"] = {**far["remix"], "vector": AWAY, "floor": 0.5}
    result, plain = run(llm, [far, None], prompt)
    assert outputs(result) == outputs(plain)
    assert result.outputs[0].moe_tta is None


REFUSED = {
    "weights of its own": (
        asking(update="ngd", alpha=0.5),
        "moe_tta.remix",
        "expected without alpha: ngd finds the share itself",
    ),
    "steps of no descent": (
        asking(steps=3),
        "moe_tta.remix",
        "expected steps with update ngd only",
    ),
    "two rounds": (
        {**asking(update="ngd"), "reroute": {}},
        "moe_tta.remix",
        "expected not beside reroute",
    ),
    "in a pair": (
        {"contrast": {"weak": asking(update="ngd")}},
        "moe_tta.contrast.weak.remix",
        "expected not in contrast, whose streams keep their plans",
    ),
}


@pytest.mark.parametrize(("request_", "where", "words"), REFUSED.values(), ids=REFUSED)
def test_refused(llm, prompt, request_, where, words):
    with pytest.raises(VLLMValidationError, match=words) as caught:
        run(llm, [request_], prompt)
    assert caught.value.parameter == where


def test_prompts_and_neighbours_beyond_the_limit(llm, prompt):
    with pytest.raises(VLLMValidationError, match="at most 64 tokens"):
        run(llm, [asking(update="ngd")], prompt * 4)
    llm.llm_engine.input_processor.moe_tta.context.adapter.__dict__["max_context"] = 4
    try:
        with pytest.raises(VLLMValidationError, match="neighbours have") as caught:
            run(llm, [asking(update="ngd")], prompt[:3])
    finally:
        adapter = llm.llm_engine.input_processor.moe_tta.context.adapter
        adapter.__dict__["max_context"] = 64
    assert caught.value.parameter == "moe_tta.remix.k"


def test_refused_where_the_operator_allows_no_adapter(folder, store, prompt):
    settings = {"stores": {"three": str(store.path)}}
    options = {"dtype": "float32", "additional_config": {"moe_tta": settings}}
    with engine(folder, **options) as llm:
        with pytest.raises(VLLMValidationError, match="can set adapter") as caught:
            run(llm, [asking(update="ngd")], prompt)
        assert caught.value.parameter == "moe_tta.remix"
