# SPDX-License-Identifier: Apache-2.0
"""Reading router shapes: configs of known families, and routers that are refused."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig
from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter
from vllm.model_executor.layers.fused_moe.router.custom_routing_router import (
    CustomRoutingRouter,
)
from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import (
    FusedTopKBiasRouter,
)
from vllm.model_executor.layers.fused_moe.router.fused_topk_router import (
    FusedTopKRouter,
)
from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import (
    GroupedTopKRouter,
)
from vllm.model_executor.layers.fused_moe.router.zero_expert_router import (
    ZeroExpertRouter,
)

from moe_tta.shape import RouterShape
from moe_tta.vllm_plugin import worker
from moe_tta.vllm_plugin.model_shape import UnsupportedModelError, shape_from_config
from moe_tta.vllm_plugin.router_shape import shape_from_routers
from tests.tiny import COMMON, CONFIGS

SHAPE = RouterShape(
    layers=(0, 1), num_hidden_layers=2, num_experts=16, top_k=4, k_max=4
)
BIAS = torch.zeros(16)
TABLE = torch.zeros(256, 4, dtype=torch.int32)


def config_of(name, **fields):
    fields = {**COMMON, **CONFIGS[name], **fields}
    return AutoConfig.for_model(fields.pop("model_type", name), **fields)


@pytest.mark.parametrize(
    ("name", "fields", "layers"),
    [
        ("mixtral", {}, (0, 1, 2, 3)),
        ("qwen2_moe", {}, (0, 2, 3)),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (1, 3)),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
        ("deepseek_v2", {"first_k_dense_replace": 0}, (0, 1, 2, 3)),
        ("deepseek_v3", {"moe_layer_freq": 2}, (2,)),
        ("deepseek_v3", {"first_k_dense_replace": 3, "moe_layer_freq": 3}, (3,)),
        ("glm4_moe", {"first_k_dense_replace": 1}, (1, 2, 3)),
    ],
)
def test_moe_layers(name, fields, layers):
    assert shape_from_config(config_of(name, **fields)).layers == layers


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("deepseek_v3", {"first_k_dense_replace": 4}),
        ("qwen3_moe", {"num_experts": 0}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1, 2, 3]}),
    ],
)
def test_dense_models(name, fields):
    assert shape_from_config(config_of(name, **fields)) is None


@pytest.mark.parametrize(
    ("topk_method", "biased"), [("noaux_tc", True), ("greedy", False)]
)
def test_deepseek_bias(topk_method, biased):
    config = config_of("deepseek_v3", topk_method=topk_method)
    assert shape_from_config(config).has_correction_bias is biased


@pytest.mark.parametrize(("name", "reach"), [("deepseek_v3", 8), ("glm4_moe", 16)])
def test_width(name, reach):
    """A token is never given more experts than its groups hold."""
    assert shape_from_config(config_of(name), reach).k_max == reach
    with pytest.raises(UnsupportedModelError, match=rf"must lie in 4\.\.{reach}"):
        shape_from_config(config_of(name), reach + 1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (config_of("phimoe"), "PhiMoE routes by sparsemixer"),
        (config_of("deepseek_v2", n_group=None), "leaves num_expert_group unset"),
        (
            SimpleNamespace(model_type="new_moe", num_experts=8),
            "does not know the routers of model type 'new_moe'; known: deepseek_v2,",
        ),
    ],
)
def test_refused_configs(config, words):
    with pytest.raises(UnsupportedModelError, match=words) as error:
        shape_from_config(config)
    assert "MOE_TTA_DISABLE=1" in str(error.value)


def shape_of(*routers):
    loaded = [SimpleNamespace(layer_id=i, router=r) for i, r in enumerate(routers)]
    return shape_from_routers(loaded, SHAPE)


def grouped(**fields):
    return GroupedTopKRouter(
        4, 16, **{"num_expert_group": 4, "topk_group": 2, **fields}
    )


ROUTERS = {
    "own function": (
        CustomRoutingRouter(4, 16, lambda **arguments: None),
        "its own routing function",
    ),
    "own function on CPU": (
        CPURouter(4, 16, custom_routing_function=lambda **arguments: None),
        "its own routing function",
    ),
    "zero experts": (
        ZeroExpertRouter(4, 16, BIAS, 12, "identity"),
        "no experts but pass the token on",
    ),
    "hashed": (
        FusedTopKBiasRouter(4, 16, BIAS, hash_indices_table=TABLE),
        "by token id",
    ),
    "hashed on CPU": (CPURouter(4, 16, hash_indices_table=TABLE), "by token id"),
    "image bias": (FusedTopKBiasRouter(4, 16, BIAS, bias_vl=BIAS), "image tokens"),
    "fused shared experts": (grouped(num_fused_shared_experts=1), "shared experts"),
    "uneven groups": (grouped(num_expert_group=3), "16 experts in 3 groups"),
    "groups of one": (grouped(num_expert_group=16), "16 experts in 16 groups"),
    "too many groups": (grouped(topk_group=5), "4 groups, 5 of them used"),
    "scoring": (FusedTopKRouter(4, 16, scoring_func="tanh"), "score by tanh"),
    "ungrouped bias on CPU": (
        CPURouter(4, 16, e_score_correction_bias=BIAS),
        "vLLM's CPU router follows",
    ),
    "unknown kind": (
        type("NewRouter", (FusedTopKRouter,), {})(4, 16),
        "does not know routers of kind NewRouter",
    ),
}


@pytest.mark.parametrize(("router", "words"), ROUTERS.values(), ids=ROUTERS)
def test_refused_routers(router, words):
    with pytest.raises(UnsupportedModelError, match="MOE_TTA_DISABLE=1") as error:
        shape_of(FusedTopKRouter(4, 16), router)
    assert words in str(error.value)


def test_differing_layers():
    with pytest.raises(UnsupportedModelError, match=r"layers 0 and 2 differ.*top_k 4"):
        shape_of(*[FusedTopKRouter(k, 16) for k in (4, 4, 2)])


@pytest.mark.parametrize(
    ("router", "fields"),
    [
        (FusedTopKRouter(4, 16), {}),
        (FusedTopKRouter(4, 16, "sigmoid", False), {"scoring": "sigmoid"}),
        (
            FusedTopKBiasRouter(4, 16, BIAS, routed_scaling_factor=2.5),
            {
                "scoring": "sigmoid",
                "has_correction_bias": True,
                "routed_scaling_factor": 2.5,
            },
        ),
        (
            grouped(routed_scaling_factor=16.0),
            {
                "num_expert_group": 4,
                "topk_group": 2,
                "routed_scaling_factor": 16.0,
            },
        ),
    ],
)
def test_cuda_routers(router, fields):
    """What no family uses yet is still read as it is, to be compared."""
    shape = shape_of(router, router)
    want = {"renormalize": router.renormalize, **fields}
    assert {name: getattr(shape, name) for name in want} == want


def arm(config, count):
    vllm_config = SimpleNamespace(
        additional_config={}, model_config=SimpleNamespace(hf_text_config=config)
    )
    loaded = [SimpleNamespace(layer_id=i) for i in range(count)]
    worker.WorkerState(vllm_config, torch.device("cpu")).arm(loaded)


def test_experts_the_config_does_not_name():
    dense = SimpleNamespace(model_type="new")
    arm(dense, 0)
    with pytest.raises(UnsupportedModelError, match=r"names 0 MoE layers.*loaded 3"):
        arm(dense, 3)
    with pytest.raises(UnsupportedModelError, match=r"names 4 MoE layers.*loaded 0"):
        arm(config_of("mixtral"), 0)


def test_refusal_stops_the_engine(tiny_models):
    code = "import sys; from tests.plugin.engine import *; make_engine(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, tiny_models("phimoe")],
        capture_output=True,
        text=True,
        env=os.environ,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode != 0
    assert "PhiMoE routes by sparsemixer" in done.stderr
