# SPDX-License-Identifier: Apache-2.0
"""Every model family arms all of its MoE layers and routes by the law, on CPU.

The law's rules are written down in `tests/families.py`; what the plugin read from the
config and from the routers must be the same, and so must vLLM's own choices.
"""

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from vllm.model_executor.layers.fused_moe import layer as fused_moe_layer
from vllm.model_executor.layers.fused_moe.router import router_factory

from moe_tta.vllm_plugin.router_shape import shape_from_routers
from tests.families import CASES
from tests.kernels.cases import U
from tests.plugin.engine import engine, generate, sampling, status
from tests.plugin.spying import Oracle, runners, saved_bias, spied
from tests.plugin.stock import run_stock
from tests.plugin.test_replica import check

SAMPLING = {"tokens": 8, "logprobs": 5}
ELSEWHERE = ("mixtral", "olmoe", "qwen2_moe", "qwen3_moe")  # in test_replica.py
each = partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


def prompts(count=4):
    rng = random.Random(13)
    lengths = [rng.randrange(8, 50) for _ in range(count)]
    return [[rng.randrange(2, 256) for _ in range(length)] for length in lengths]


def edited(shape):
    """A request that changes the choice of every layer and its number of experts."""
    demote = [[layer, e] for layer in shape.layers for e in range(0, 6, 2)]
    return {
        "steer": {"demote": demote, "bias": [[shape.layers[0], 1, 1.5]]},
        "dynamic_k": {"p": 0.7, "k_max": shape.k_max},
    }


def tolerance(logits):
    """Relative error of a weight: z - logZ, exp, a sum and two divisions.

    |z - logZ| <= 32 rounds by 16 U, and so does logZ; exp makes that relative. Sums of
    at most 10 weights and of 64 terms in vector lanes, exp, the sigmoid and the
    divisions add 24 U, as in tests/kernels/test_against_vllm.py.
    """
    assert logits.abs().max() <= 14
    return 56 * U


def assert_law(calls, law):
    for call in calls:
        want = law(call)
        torch.testing.assert_close(
            per_expert(call.weights, call.ids, call.logits),
            per_expert(want.topk_weights, want.topk_ids, call.logits),
            rtol=tolerance(call.logits),
            atol=0,
        )


def per_expert(weights, ids, logits):
    """Return weights [T, E], 0 where not chosen.

    Columns come in any order, and unused ones repeat an id with weight 0.
    """
    return torch.zeros_like(logits, dtype=torch.float32).scatter_add_(
        1, ids.long(), weights.float()
    )


@pytest.fixture
def router_arguments(monkeypatch):
    """Note how the model asks vLLM for its routers."""
    asked = []

    def create(**kwargs):
        asked.append(kwargs)
        return router_factory.create_fused_moe_router(**kwargs)

    monkeypatch.setattr(fused_moe_layer, "create_fused_moe_router", create)
    return asked


@each(argvalues=CASES)
def test_armed_neutral_and_edited(
    tiny_models, tmp_path, case, router_arguments, monkeypatch
):
    model, asked = tiny_models(case.name), prompts()
    options = {"dtype": "float32", **case.cpu_options}
    want = run_stock(model, asked, SAMPLING, tmp_path, engine=options)
    shape = replace(case.shape, k_max=case.k_max)
    request = edited(shape)
    oracle = Oracle(model, shape, request)
    wide = {"additional_config": {"moe_tta": {"k_max": case.k_max}}}
    with engine(model, **options, **wide) as llm:
        assert status(llm)["armed_layers"] == list(shape.layers)
        assert llm.llm_engine.input_processor.moe_tta.shape == shape
        for runner in runners(llm):
            assert_live_bias(runner, saved_bias(model, runner.layer_id))
        params = [sampling(**SAMPLING)] * len(asked)
        with spied(llm) as calls:
            assert generate(llm, asked, params) == want
        assert_law(calls, oracle.own)
        with spied(llm) as calls:
            generate(llm, asked, [sampling(8, request)] * len(asked))
        assert len(calls) >= 8 * len(shape.layers)
        assert_law(calls, oracle.planned)
        assert any(not torch.equal(oracle.own(c).topk_ids, c.ids) for c in calls)
        check_cuda_routers(runners(llm), router_arguments, case, shape, monkeypatch)


def assert_live_bias(runner, saved):
    """The rule reads the router's own tensor, which holds the checkpoint's values."""
    bias = runner.router.moe_tta.rule.correction_bias
    assert (bias is None) == (saved is None)
    if saved is not None:
        assert bias is runner.router.e_score_correction_bias
        assert saved.std() > 0
        assert torch.equal(bias.float(), saved.float())


def check_cuda_routers(loaded, arguments, case, shape, monkeypatch):
    """The routers that CUDA would get for the same arguments read the same."""
    assert len(arguments) == len(shape.layers)
    with monkeypatch.context() as patch:
        patch.setattr(router_factory.current_platform, "is_cpu", lambda: False)
        routers = [router_factory.create_fused_moe_router(**a) for a in arguments]
    assert {type(router).__name__ for router in routers} == {case.cuda_router}

    class Runner:
        def __init__(self, layer_id, router):
            self.layer_id, self.router = layer_id, router

    fakes = [Runner(r.layer_id, x) for r, x in zip(loaded, routers, strict=True)]
    assert shape_from_routers(fakes, shape) == shape


@each(argvalues=[case for case in CASES if case.name not in ELSEWHERE])
def test_replica(tiny_models, case):
    """End to end in float32, where a wrong rule shows sharply."""
    wide = {"moe_tta": {"k_max": case.k_max}}
    options = case.cpu_options
    check(tiny_models(case.name), torch.float32, wide, vocab=256, options=options)
