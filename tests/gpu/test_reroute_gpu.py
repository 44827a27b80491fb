# SPDX-License-Identifier: Apache-2.0
"""Rerouting and remix's descent on a GPU: Model Runner V2, full graphs, async steps.

Everything is float32, and one engine serves the file: about a minute and a half on an
H200. Texts equal those of the plain loop, but where the loop's own best two logits are
nearer than rounding can tell.
"""

import gc
import logging
import random
from dataclasses import asdict

import numpy as np
import pytest
import torch

from moe_tta.adapter import (
    GradientDescent,
    NeighbourTail,
    descend_neighbours,
    last_row_routing,
)
from moe_tta.adapter.descent import autograd_gradient
from tests.adapter import independent
from tests.gpu import adapter_checks as checks
from tests.gpu.test_isolation import GRAPHS
from tests.gpu.worded import NEAR, nearest, store_of, with_words
from tests.plugin.engine import engine, generate, outputs, sampling, status
from tests.plugin.reroute_reference import Loop
from tests.plugin.test_reroute import REQUESTS, TOKENS, draw_prompts
from tests.plugin.test_reroute_crowd import check_empty, scheduler_of

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
log = logging.getLogger(__name__)
# Adam divides by |gradient| + 1e-5: rounding of 1e-8 in a gradient moves a vector by
# 1e-3 of a step, 0.3 x 5 steps x 4 layers move a logit by 6e-3, and a lead has two
LEAD = 1.2e-2
FLOAT32 = 16 * 4 * torch.finfo(torch.float32).eps * 12  # see test_adapter_gpu
PROMPTS = draw_prompts(6, random.Random(3))
DESCENT = GradientDescent(steps=6, lr=20.0, lr_end=1.0, core=6)
NGD = {"remix": {"store": "three", "vector": NEAR, "update": "ngd", **asdict(DESCENT)}}


@pytest.fixture(scope="module", autouse=True)
def _exact_products():
    """Triton's products of float32 keep float32: vLLM's experts use TF32 otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_F32_DEFAULT", "ieee")
        yield


@pytest.fixture(scope="module")
def folder(tiny_models, tmp_path_factory):
    return with_words(
        tiny_models("mixtral"), tmp_path_factory.mktemp("worded") / "mixtral"
    )


@pytest.fixture(scope="module")
def store(folder, tmp_path_factory):
    return store_of(folder, tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def llm(folder, store):
    settings = {
        **{"adapter": {"budget": 500}, "k_max": 4, "allow_inline": True},
        "stores": {"three": str(store.path)},
    }
    options = {**GRAPHS, "additional_config": {"moe_tta": settings}}
    with engine(
        str(folder), **options, enable_prefix_caching=False, skip_tokenizer_init=False
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def loop(llm, folder):
    shape = llm.llm_engine.input_processor.moe_tta.shape
    return Loop(str(folder), shape, checks.adapter_of(llm))


def ask(llm, prompts, request, **options):
    return llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        sampling(TOKENS, request, **options),
        use_tqdm=False,
    )


def parts(tokens, want, leads):
    """Say whether texts part; where they do, the reference must be undecided."""
    for one, other, lead in zip(tokens, want, leads, strict=True):
        if one != other:
            assert lead <= LEAD
            return True
    return False


def test_the_machinery_is_the_gpus(llm):
    assert llm.llm_engine.vllm_config.use_v2_model_runner
    assert checks.adapter_of(llm).device.type == "cuda"
    checks.check_views(llm)


def test_texts_equal_the_plain_loop(llm, loop):
    """All kinds of requests in one batch, and every weight keeps its bits."""
    before = checks.snapshot(llm)
    pairs = [(name, prompt) for name in REQUESTS for prompt in PROMPTS[:3]]
    got = generate(
        llm,
        [prompt for _, prompt in pairs],
        [sampling(TOKENS, REQUESTS[name]) for name, _ in pairs],
    )
    plain = generate(llm, PROMPTS[:3], [sampling(TOKENS)] * 3)
    assert checks.changed(llm, before) == []
    parted = 0
    for (name, prompt), (tokens, _) in zip(pairs, got, strict=True):
        want, _ = loop.generate(REQUESTS[name], prompt, TOKENS)
        parted += parts(tokens, want, loop.leads)
    log.info("%d of %d texts part from the loop", parted, len(pairs))
    assert parted <= len(pairs) // 10
    once = [tokens for (name, _), (tokens, _) in zip(pairs, got, strict=True)][3:6]
    assert all(ours != base for ours, (base, _) in zip(once, plain, strict=True))


def test_batched_rounds_equal_the_plain_loop(llm, loop, monkeypatch):
    """Four texts in one job at least at the start, where all are due."""
    monkeypatch.setattr(scheduler_of(llm).rounds, "_batch_tokens", 1000)
    found = ask(llm, PROMPTS[:4], REQUESTS["defaults"])
    rounds = [one.outputs[0].moe_tta["rounds"] for one in found]
    assert len({of[0]["milliseconds"] for of in rounds}) == 1  # shares of one job
    parted = 0
    for prompt, output in zip(PROMPTS, found, strict=False):
        want, _ = loop.generate(REQUESTS["defaults"], prompt, TOKENS)
        parted += parts(outputs(output)[0], want, loop.leads)
    assert parted <= 1


def test_rate_zero_is_the_model(llm):
    """`overlap` leaves the batches as they are: not a bit may differ.

    `wait` computes the row of a version by itself, so that a GPU rounds it elsewhere.
    """
    plain = generate(llm, PROMPTS, [sampling(TOKENS)] * len(PROMPTS))
    for mode, every in (("overlap", 8), ("wait", 8), ("wait", 0)):
        asked = {"every": every, "mode": mode, "lr": 0.0, "steps": 2}
        found = ask(llm, PROMPTS, {"reroute": asked})
        assert all(one.outputs[0].moe_tta["rounds"] for one in found)
        got = [outputs(one) for one in found]
        if mode == "overlap":
            assert got == plain
        for ours, base in zip(got, plain, strict=True):
            assert ours[0] == base[0]
            np.testing.assert_allclose(ours[1], base[1], rtol=0, atol=FLOAT32)


def test_neighbours_do_not_see_each_other(llm):
    """Two adapted requests and plain ones: what each says in the others' absence."""
    requests = [REQUESTS["once"], None, REQUESTS["layers"], None]
    params = [sampling(TOKENS, request) for request in requests]
    together = generate(llm, PROMPTS[:4], params)
    missed = 0.0
    for prompt, param, (tokens, logprobs) in zip(
        PROMPTS[:4], params, together, strict=True
    ):
        [(alone, values)] = generate(llm, [prompt], [param])
        assert tokens == alone
        missed = max(missed, float(np.abs(np.subtract(logprobs, values)).max()))
    log.info("logprobs in company and alone differ by %.1e at most", missed)
    # vectors of another request would move them by tenths
    assert missed <= LEAD


def test_overlap_is_replayed_by_its_report(llm, loop, monkeypatch):
    """A budget below a round a step lets rows go ahead under the old version."""
    monkeypatch.setattr(scheduler_of(llm).rounds, "_budget", 40)
    asked = {"every": 8, "steps": 2, "lr": 0.3}
    recorded = ask(llm, PROMPTS[:3], {"reroute": {**asked, "mode": "overlap"}})
    late = parted = 0
    for prompt, output in zip(PROMPTS, recorded, strict=False):
        rounds = output.outputs[0].moe_tta["rounds"]
        assert all(r["outcome"] == "adapted" for r in rounds)
        pairs = [[r["context"], r["start"]] for r in rounds]
        late += sum(start >= context for context, start in pairs)
        replay = {"reroute": {"steps": 2, "lr": 0.3, "replay": pairs}}
        [(again, _)] = generate(llm, [prompt], [sampling(TOKENS, replay)])
        starts = [start for _, start in pairs] + [10**6] * 4
        want, _ = loop.generate({"reroute": asked}, prompt, TOKENS, starts)
        for tokens in (outputs(output)[0], again):
            parted += parts(tokens, want, loop.leads)
    assert late > 1
    assert parted <= 1


def test_nothing_is_left(llm):
    """Not even the hidden states [c, H] of the longest context read."""
    generate(llm, PROMPTS, [sampling(TOKENS, REQUESTS["defaults"])] * len(PROMPTS))
    held = []
    for _ in range(4):
        ask(llm, PROMPTS, REQUESTS["defaults"])
        check_empty(llm)
        gc.collect()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated())
    log.info("allocated after each batch: %s", held)
    config = checks.adapter_of(llm).config
    assert held[-1] - held[0] < max(map(len, PROMPTS)) * config.hidden_size * 4
    assert status(llm)["jobs"] == 0


def test_descent_is_transformers_own(llm, folder, store):
    """NGD's gradient at a request's own routing, by hooks at transformers' gates."""
    adapter, texts = checks.adapter_of(llm), nearest(store)
    model = checks.hf_model(folder, torch.float32, adapter.device)
    layers = list(adapter.shape.layers)
    own = last_row_routing(adapter, [PROMPTS[0]])
    tail = NeighbourTail(adapter, texts, layers)
    loss, slope = autograd_gradient(tail.loss)(own)
    want, gradient = 0.0, torch.zeros_like(own[0])
    with adapter.device:
        for prompt, answer, weight, _ in texts:
            part = independent.answer_gradient(model, prompt, answer, layers, own[0])
            want += weight * float(part[0])
            gradient += weight * part[1]
    assert abs(float(loss[0]) - want) <= 1e-5 * want
    assert float((slope[0] - gradient).norm()) <= 1e-5 * float(gradient.norm())


def test_descent_is_served(llm, store):
    """The loss falls as the adapter alone lets it fall, and the text follows it."""
    plain, served = (ask(llm, [PROMPTS[0]], request)[0] for request in (None, NGD))
    (report,) = served.outputs[0].moe_tta["rounds"]
    assert report["outcome"] == "adapted"
    assert report["losses"][-1] < report["losses"][0] - 0.1
    adapter, layers = checks.adapter_of(llm), report["layers"]
    tail = NeighbourTail(adapter, nearest(store), layers)
    places = [adapter.shape.layers.index(layer) for layer in layers]
    own = last_row_routing(adapter, [PROMPTS[0]])[:, places]
    done = descend_neighbours(tail, own, DESCENT)
    log.info("losses served %s, alone %s", report["losses"], done.losses[0].tolist())
    np.testing.assert_allclose(report["losses"], done.losses[0].tolist(), atol=1e-4)
    rows = zip(layers, done.omega[0].tolist(), strict=True)
    given = {"remix": {"distribution": {str(layer): row for layer, row in rows}}}
    [sent] = ask(llm, [PROMPTS[0]], given)
    assert outputs(served)[0] == outputs(sent)[0] != outputs(plain)[0]
