# SPDX-License-Identifier: Apache-2.0
"""Experts that skip unused columns give what computing them with weight 0 gives."""

import random

import pytest
import torch

from tests.gpu.test_v2_runner import GRAPHS
from tests.plugin.engine import engine, generate, sampling
from tests.requests import random_request

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device"
)
WIDE = {"additional_config": {"moe_tta": {"k_max": 12}}}
HALF = {"dynamic_k": {"k": 4}}


def jobs(shape):
    rng = random.Random(3)
    requests = [HALF, {"dynamic_k": {"k": 1}}, None]
    requests += [random_request(rng, shape) for _ in range(29)]
    prompts = [
        [rng.randrange(2, 256) for _ in range(rng.randrange(1, 90))] for _ in requests
    ]
    return prompts, [sampling(24, request) for request in requests]


def poison_workspace():
    """Fill the experts' workspace with NaN, as rows that nobody writes may hold."""
    from vllm.v1.worker.workspace import current_workspace_manager

    for workspace in current_workspace_manager()._current_workspaces:
        if workspace is not None:
            workspace.view(torch.uint8).fill_(0xFF)


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_skipped_equals_computed(tiny_models, monkeypatch, eager):
    """Bit for bit: adding 0 changes no sum."""
    options = {**GRAPHS, **WIDE, "enforce_eager": eager}
    results = {}
    for skips in (True, False):
        if not skips:
            monkeypatch.setattr(
                "moe_tta.vllm_plugin.gpu_router.let_experts_skip", lambda runner: False
            )
        with engine(tiny_models("olmoe"), **options) as llm:
            armed = llm.collective_rpc("moe_tta_status")[0]
            assert armed["skips_unused"] is skips
            poison_workspace()
            prompts, params = jobs(llm.llm_engine.input_processor.moe_tta.shape)
            together = generate(llm, prompts, params)
            # one token a step: vLLM's path without alignment of blocks
            alone = [
                generate(llm, [prompt], [one])[0]
                for prompt, one in list(zip(prompts, params, strict=True))[:6]
            ]
        results[skips] = together, alone
    assert results[True] == results[False]
